"""Evaluation on every topology: the same numbers and predictions, and those of plain loops over transformers' model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from combos import more
from families import write_family
from runs import Sections, changed
from topologies import sizes_of, world_size_of
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from collie_core.api import CollieError, RunConfig, Trainer
from collie_core.cli import main
from collie_core.evaluate.run import better
from collie_core.generate import answer_text, generate

REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
TOPOLOGIES = ["tp2", "pp2", "pp3", "tp2pp2", "dp2zero3"]
STORIES = ["Once upon a time there was a", "The dog ran to", "Lily and Ben saw a big", "One day", 'Mom said: "Do not']
PROMPTS = [f"{story} {'very ' * (number % 4)}" for number, story in enumerate(STORIES * 4)]
WINDOW, STRIDE, NEW = 48, 20, 12
TEMPLATE = "Story: {text}\nIt is"
EVALUATORS: list[dict[str, Any]] = [
    {"type": "perplexity", "metrics": ["perplexity", "token-accuracy"]},
    {"type": "perplexity", "name": "long", "window": WINDOW, "stride": STRIDE},
    {"type": "generation", "max_new_tokens": NEW, "metrics": ["bleu", "numeric-match"], "stop": ["."]},
    {"type": "generation", "name": "drawn", "max_new_tokens": NEW, "temperature": 0.8, "top_k": 20},
    {"type": "generation", "name": "beams", "max_new_tokens": NEW, "num_beams": 4, "repetition_penalty": 1.2},
    *(
        {"type": "classification", "name": normalise, "normalise": normalise, "metrics": ["accuracy", "f1"]}
        for normalise in ("none", "length", "unconditional")
    ),
    {"type": "classification", "name": "written", "by": "generation", "max_new_tokens": 4, "metrics": ["accuracy"]},
]


class Files(NamedTuple):
    """Samples: nine of each kind, so that two ranks get batches of two unevenly."""

    answers: Path
    choices: Path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("samples")
    answers = [
        {"input": prompt, "output": f" happy girl {'who played all day ' * number}with {number} cats."}
        for number, prompt in enumerate(PROMPTS[:9])
    ]
    choices = [
        {"text": prompt, "options": [" good", " very bad", " a day of rain"], "answer": number % 3}
        for number, prompt in enumerate(PROMPTS[:9])
    ]
    found = Files(folder / "answers.jsonl", folder / "choices.jsonl")
    for path, rows in zip(found, (answers, choices), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return found


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained weights where they are; else random ones."""
    if (real := REAL_DATA / "stories260K-hf").is_dir():
        return real
    folder = tmp_path_factory.mktemp("model")
    write_family(folder, "llama_tied")
    return folder


def sections_for(topology: str, model: Path, files: Files, output: Path) -> Sections:
    sizes = sizes_of(topology)
    evaluators = [dict(section) for section in EVALUATORS]
    for section in evaluators:
        if section["type"] == "classification":
            section |= {"data": str(files.choices), "prompt": TEMPLATE, "choices": "options", "label": "answer"}
    return {
        "model": {"model_name_or_path": str(model)},
        "data": {
            "train": str(files.answers),
            "eval": str(files.answers),
            "max_length": 64,
            "cache_dir": str(output / "cache"),
        },
        "parallel": {
            "tensor_parallel_size": sizes["tp"],
            "pipeline_parallel_size": sizes["pp"],
            "zero_stage": sizes["zero"],
        },
        "train": {"max_steps": 1, "global_batch_size": 2, "output_dir": str(output / "run"), "seed": 3},
        "optimizer": {"type": "adamw", "lr": 1e-2},
        "evaluation": {"per_device_eval_batch_size": 2, "print_samples": 3, "evaluators": evaluators},
    }


class Seen:
    """A callback that keeps what the main rank is told, and what a model generates before the first step."""

    def __init__(self, answer: Any = None) -> None:
        self.results: list[dict[str, float]] = []
        self.shown: list[list[str]] = []
        self.answer = answer
        self.ids: Any = None

    def collie_evaluated(self, results: dict[str, float], samples: Any) -> None:
        self.results.append(dict(results))
        self.shown.append([sample.prediction for sample in samples])

    def collie_before_step(self, run: Any) -> None:
        if self.answer is not None:
            self.ids = self.answer(run.model, run.topology.dp)


def measure(topology: str, model: Path, files: Files, output: Path, changes: dict[str, Any]) -> Any:
    """What one rank finds: results, what is shown, and the ids after twenty prompts."""
    zero3 = sizes_of(topology)["zero"] == 3
    tokenizer = AutoTokenizer.from_pretrained(model)

    def answers(whole: Any, dp: Any) -> Any:
        share = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS[dp.rank :: dp.size]]
        return [
            generate(whole, tokenizer, share, max_new_tokens=NEW, synced=zero3, **options)
            for options in ({}, {"num_beams": 4}, {"temperature": 1.0, "top_k": 10, "seed": 5})
        ]

    seen = Seen(answers)
    config = RunConfig(**changed(sections_for(topology, model, files, output), changes))
    trainer = Trainer(config, callbacks=[seen], observers=())
    if zero3 or config.adapter is not None:
        trainer.train()
    else:
        trainer.evaluate()
        seen.ids = answers(trainer.model, trainer.topology.dp)
    named = {name: value for name, value in trainer.results.items() if name.startswith("eval/")}
    return seen.results, seen.shown, seen.ids, named


def predictions(folder: Path, when: str = "") -> dict[str, list[dict[str, Any]]]:
    """The rows of each file."""
    files = sorted((folder / "run" / "predictions").glob(f"*{when}.jsonl"))
    return {
        path.stem.removesuffix(when): [json.loads(line) for line in path.read_text().splitlines()] for path in files
    }


@pytest.fixture(scope="module")
def alone(zygote: Any, model_folder: Path, files: Files, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Results, what is shown, ids and predictions of one process."""
    folder = tmp_path_factory.mktemp("alone")
    ((results, shown, ids, _),) = zygote.run(
        __file__, "measure", world_size=1, args=("dp1", model_folder, files, folder, {})
    )
    return results[0], shown[0], ids, predictions(folder)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # DeepSpeed calls collectives that torch deprecates
@pytest.mark.parametrize("topology", [more(name) if name == "dp2zero3" else name for name in TOPOLOGIES])
def test_numbers_and_predictions_are_those_of_one_process(
    topology: str, zygote: Any, model_folder: Path, files: Files, alone: Any, tmp_path: Path
) -> None:
    zero3 = sizes_of(topology)["zero"] == 3
    ranks = zygote.run(
        __file__,
        "measure",
        world_size=world_size_of(topology),
        args=(topology, model_folder, files, tmp_path, {"evaluation.on_start": zero3}),
        limit_s=240,
    )
    results, shown, ids, written = alone
    assert ranks[0][0][0] == pytest.approx(results, rel=1e-5)
    assert ranks[0][1][0] == shown
    found = predictions(tmp_path, "-step-00000000" if zero3 else "")
    assert found.keys() == written.keys()
    for name, rows in written.items():
        assert [row["index"] for row in found[name]] == list(range(9))
        scores = [[row.pop("scores", []) for row in both] for both in (found[name], [dict(row) for row in rows])]
        torch.testing.assert_close(torch.tensor(scores[0]), torch.tensor(scores[1]), rtol=0, atol=1e-4)
        assert found[name] == [{key: value for key, value in row.items() if key != "scores"} for row in rows]
    size = sizes_of(topology)["dp"]
    for rank in ranks:
        assert rank[3] == ranks[0][3]  # every rank knows the results, and of the main one a callback is told
    for place, own in enumerate(rank[2] for rank in ranks[:: world_size_of(topology) // size]):
        assert own[:2] == [answers[place::size] for answers in ids[:2]]
    if size == 1:  # draws depend on the batch
        assert all(rank[2] == ids for rank in ranks)


# -- plain loops ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(model_folder: Path) -> Any:
    """transformers' model and tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(model_folder)


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    return map(json.loads, path.read_text().splitlines())


@torch.no_grad()
def losses_of(model: Any, ids: list[int], start: int, begin: int = 0) -> torch.Tensor:
    """The losses of the tokens from `start` on, when the model sees those from `begin` on."""
    logits = model(torch.tensor([ids[begin:]])).logits[0, :-1].double()
    losses = F.cross_entropy(logits, torch.tensor(ids[begin + 1 :]), reduction="none")
    return losses[max(0, start - begin - 1) :]


def test_ids_are_those_of_transformers(alone: Any, plain: Any) -> None:
    model, tokenizer = plain
    tokenizer.padding_side, pad = "left", tokenizer.pad_token
    tokenizer.pad_token = pad or tokenizer.eos_token
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    tokenizer.pad_token = pad
    for found, options in zip(alone[2], ({}, {"num_beams": 4}), strict=False):
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        output = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, pad_token_id=2, **options)
        expected = [row[batch["input_ids"].shape[1] :].tolist() for row in output]
        ended = [row[: row.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in row else row for row in expected]
        assert found == ended
    assert alone[2][2] != alone[2][0]


def test_losses_are_those_of_a_plain_loop(alone: Any, plain: Any, files: Files) -> None:
    model, tokenizer = plain
    cut, moving, hits = [], [], 0
    for row in rows_of(files.answers):
        prompt = row["input"]
        encoded = tokenizer(prompt + row["output"], return_offsets_mapping=True)
        start = sum(stop <= len(prompt) for _, stop in encoded["offset_mapping"])
        ids = [*encoded["input_ids"], tokenizer.eos_token_id]
        cut.append(losses_of(model, ids[:64], start))
        with torch.no_grad():
            best = model(torch.tensor([ids[:64]])).logits[0, :-1].argmax(-1).tolist()
        hits += sum(best[place - 1] == ids[place] for place in range(start, min(64, len(ids))))
        scored = 0
        for begin in range(0, len(ids), STRIDE):  # as transformers documents perplexity of fixed-length models
            stop = min(begin + WINDOW, len(ids))
            if stop > max(scored, start):
                moving.append(losses_of(model, ids[:stop], max(scored, start), begin))
            scored = stop
            if stop == len(ids):
                break
    results = alone[0]
    assert results["eval/loss"] == pytest.approx(torch.cat(cut).mean().item(), abs=1e-5)
    assert results["eval/perplexity"] == pytest.approx(math.exp(torch.cat(cut).mean().item()), rel=1e-5)
    assert results["eval/long/loss"] == pytest.approx(torch.cat(moving).mean().item(), abs=1e-5)
    assert len(torch.cat(moving)) > len(torch.cat(cut))  # some were cut off
    assert results["eval/token_accuracy"] == hits / len(torch.cat(cut))


def test_likelihoods_are_those_of_a_plain_loop(alone: Any, plain: Any, files: Files) -> None:
    model, tokenizer = plain

    def score(prompt: str, choice: str) -> tuple[float, int]:
        encoded = tokenizer(prompt + choice, return_offsets_mapping=True)
        start = sum(stop <= len(prompt) for _, stop in encoded["offset_mapping"])
        losses = losses_of(model, encoded["input_ids"], start)
        return -losses.sum().item(), len(losses)

    right: dict[str, list[bool]] = {"none": [], "length": [], "unconditional": []}
    for place, row in enumerate(rows_of(files.choices)):
        prompt = TEMPLATE.replace("{text}", row["text"])
        own = [score(prompt, choice) for choice in row["options"]]
        neutral = [score("Answer:", choice)[0] for choice in row["options"]]
        scores = {
            "none": [total for total, _ in own],
            "length": [total / length for total, length in own],
            "unconditional": [total - base for (total, _), base in zip(own, neutral, strict=True)],
        }
        for name, expected in scores.items():
            assert alone[3][name][place]["scores"] == pytest.approx(expected, rel=1e-5)
            right[name].append(expected.index(max(expected)) == row["answer"])
    for name, hits in right.items():
        assert alone[0][f"eval/{name}/accuracy"] == pytest.approx(sum(hits) / len(hits))


def test_answers_are_written_with_their_references(alone: Any, files: Files) -> None:
    _, shown, _, written = alone
    rows = [*rows_of(files.answers)]
    for name in ("generation", "drawn", "beams"):
        assert [row["references"] for row in written[name]] == [[row["output"]] for row in rows]
        assert [row["prompt"] for row in written[name]] == [row["input"] for row in rows]
    assert all("." not in row["prediction"] for row in written["generation"])
    assert any("." in row["prediction"] for row in written["drawn"])
    assert shown[3:6] == [row["prediction"] for row in written["generation"][:3]]


# -- adapters -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["lora", "prompt_tuning"])
def test_an_adapter_is_measured_alike_everywhere(
    method: str, zygote: Any, model_folder: Path, files: Files, tmp_path: Path
) -> None:
    adapter = {
        "lora": {"type": "lora", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]},
        "prompt_tuning": {"type": "prompt_tuning", "num_virtual_tokens": 4},
    }[method]
    found = {}
    for topology in ("dp1", "tp2pp2", "dp2"):
        folder = tmp_path / topology
        ranks = zygote.run(
            __file__,
            "measure_adapter",
            world_size=world_size_of(topology),
            args=(topology, model_folder, files, folder, adapter),
            limit_s=240,
        )
        found[topology] = (ranks[0], predictions(folder, "-step-00000001")["generation"])
    for topology in ("tp2pp2", "dp2"):
        assert found[topology][0] == pytest.approx(found["dp1"][0], rel=1e-4)
        assert found[topology][1] == found["dp1"][1]


def measure_adapter(topology: str, model: Path, files: Files, output: Path, adapter: dict[str, Any]) -> Any:
    """Results after a step that moved the adapter."""
    sections: Any = sections_for(topology, model, files, output)
    sections["adapter"] = adapter
    kept = ("perplexity", "generation", "none")
    evaluators = sections["evaluation"]["evaluators"]
    sections["evaluation"]["evaluators"] = [own for own in evaluators if own.get("name", own["type"]) in kept]
    results = Trainer(RunConfig(**sections), observers=()).train()
    return {name: value for name, value in results.items() if name.startswith("eval/")}


# -- one process: files, moments, and what is wrong with samples -----------------------------------------------------


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def evaluated(model: Path, output: Path, evaluator: dict[str, Any], rows: list[dict[str, Any]], **data: Any) -> Any:
    """The results of one evaluator, by the names without its own."""
    config = RunConfig(
        model={"model_name_or_path": str(model)},
        data={"eval": write(output / "rows.jsonl", rows), "cache_dir": str(output / "cache"), **data},
        train={"output_dir": str(output / "run")},
        evaluation={"evaluators": [evaluator], "per_device_eval_batch_size": 2},
    )
    results = Trainer(config, observers=()).evaluate()
    return {name.rpartition("/")[2]: value for name, value in results.items()}


GENERATION: dict[str, Any] = {"type": "generation", "max_new_tokens": 4, "metrics": ["exact-match"]}
CHOICE: dict[str, Any] = {"type": "classification", "metrics": ["accuracy"]}
PAIR = {"input": "ab", "output": "c"}


@pytest.mark.parametrize(
    ("evaluator", "row", "said"),
    [
        (GENERATION, {"input": "ab"}, "rows.jsonl:2: the columns input are no known format"),
        (GENERATION, {"input": "ab", "output": []}, "rows.jsonl:2: there is no right answer to compare with"),
        (GENERATION, {"input": "", "output": "c"}, "rows.jsonl:2: the prompt is empty"),
        (GENERATION | {"max_new_tokens": 512}, PAIR, "max_new_tokens = 512: leaves no room for a prompt in the 512"),
        (CHOICE, {"input": "ab", "output": ["c", "d"]}, "rows.jsonl:2: the column target is missing"),
        (CHOICE, {"input": "ab", "output": ["c", "d"], "target": 2}, "target=2, but the 2 choices count from 0"),
        (CHOICE, {"input": "ab", "output": ["c", "d"], "target": -1}, "target=-1, but the 2 choices count from 0"),
        (CHOICE, {"input": "ab", "output": ["c", "d"], "target": True}, "the column target is a bool"),
        (CHOICE, {"input": "ab", "output": ["c", "d"], "target": "e"}, "target='e' is none of the choices: c, d"),
        (CHOICE, {"input": "ab", "output": ["c"], "target": 0}, "output must be a list of two or more texts"),
        (CHOICE, {"input": "ab", "output": "c", "target": 0}, "output must be a list of two or more texts"),
        (CHOICE, {"output": ["c", "d"], "target": 0}, "the column input of the prompt is missing"),
        (CHOICE, {"input": "", "output": ["c", "d"], "target": 0}, "the prompt has no token of its own"),
        (CHOICE, {"input": "ab", "output": ["c" * 512, "d"], "target": 0}, "a choice of 512 tokens leaves no room"),
        ({"type": "perplexity", "stride": 40, "window": 513}, PAIR, "window = 513: is longer than the 512 positions"),
        ({"type": "perplexity", "stride": 600}, PAIR, "stride = 600: must be below the window of 512 tokens"),
        (GENERATION | {"metrics": ["exact-match", "exact-match"]}, PAIR, "exact_match is given twice"),
    ],
)
def test_what_is_wrong_with_samples_is_said_once(
    evaluator: dict[str, Any], row: dict[str, Any], said: str, tiny_llama: Path, tmp_path: Path
) -> None:
    good = PAIR if evaluator["type"] != "classification" else {"input": "ab", "output": ["c", "d"], "target": "d"}
    with pytest.raises(CollieError) as caught:
        evaluated(tiny_llama, tmp_path, evaluator, [good, row])
    assert said in str(caught.value)
    assert not list((tmp_path / "run").rglob("*.jsonl*"))


@pytest.mark.parametrize("by", ["likelihood", "generation"])
def test_prompts_beyond_the_context_lose_their_beginning_and_are_counted(
    by: str, tiny_llama: Path, tmp_path: Path
) -> None:
    rows = [{"input": "a" * length, "output": [" b", " c"], "target": 0} for length in (10, 508, 900)]
    found = evaluated(tiny_llama, tmp_path, {**CHOICE, "by": by}, rows)
    assert found["truncated_prompts"] == 1 + (by == "generation")  # 16 new tokens need more room than a choice
    short = [{"input": "a" * length, "output": " b"} for length in (10, 900)]
    assert evaluated(tiny_llama, tmp_path, GENERATION, short)["truncated_prompts"] == 1
    assert "truncated_prompts" not in evaluated(tiny_llama, tmp_path, GENERATION, short[:1])


def test_an_empty_answer_is_an_answer(tiny_llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    with torch.no_grad():  # whatever comes before, the end of text follows
        model.model.norm.weight.zero_()
        model.lm_head = torch.nn.Linear(64, len(tokenizer))
        model.lm_head.bias[tokenizer.eos_token_id] = 100.0
    config = RunConfig(
        data={"cache_dir": str(tmp_path / "cache")},
        train={"output_dir": str(tmp_path / "run")},
        evaluation={"evaluators": [GENERATION]},
    )
    rows = [PAIR, {"input": "x", "output": ""}]
    trainer = Trainer(config, model=model, tokenizer=tokenizer, eval_dataset=rows, observers=())
    assert trainer.evaluate()["eval/generation/exact_match"] == 0.5
    assert [row["prediction"] for row in predictions(tmp_path)["generation"]] == ["", ""]


def test_stops_streams_and_a_tokenizer_without_padding(plain: Any) -> None:
    model, tokenizer = plain
    prompts = [tokenizer(story)["input_ids"] for story in STORIES[:2]]
    whole = generate(model, tokenizer, prompts, max_new_tokens=30)
    text = answer_text(tokenizer, whole[0])
    stop = next(character for character in text[4:] if character.isascii() and character.isprintable())
    stopped = generate(model, tokenizer, prompts, max_new_tokens=30, stop=[stop])
    assert answer_text(tokenizer, stopped[0], [stop]) == text[: text.index(stop)]
    assert len(stopped[0]) < len(whole[0])

    class Streamer:
        def __init__(self) -> None:
            self.ids: list[int] = []

        def put(self, ids: torch.Tensor) -> None:
            self.ids += ids.flatten().tolist()

        def end(self) -> None:
            self.ids.append(-1)

    streamer = Streamer()
    (one,) = generate(model, tokenizer, prompts[:1], max_new_tokens=5, streamer=streamer)
    assert streamer.ids == [*prompts[0], *one, -1]
    for pad in (None, tokenizer.eos_token):
        tokenizer.pad_token = pad
        assert generate(model, tokenizer, prompts, max_new_tokens=30) == whole


def test_which_way_is_better_is_what_the_metrics_declare() -> None:
    written = {"type": "generation", "name": "written", "metrics": ["rouge", "decode"]}
    losses = {"type": "perplexity", "name": "long"}
    config = RunConfig(
        model={"model_name_or_path": "somewhere"},
        data={"train": "rows.jsonl", "eval": "rows.jsonl"},
        train={"max_steps": 1},
        evaluation={"evaluators": ["perplexity", losses, written]},
    )
    found = [better(config.registry, section) for section in config.evaluation.evaluators]
    assert found[0] == {"eval/loss": "min", "eval/perplexity": "min"}
    assert found[1] == {"eval/long/loss": "min", "eval/long/perplexity": "min"}
    assert found[2]["eval/written/rougeL"] == "max"
    assert not any("decode" in name for name in found[2])  # longer answers are neither better nor worse


def test_a_run_evaluates_when_it_is_told_to_and_keeps_each_time(
    tiny_llama: Path, instructions: Path, tmp_path: Path
) -> None:
    """Ten samples, three at a step: epochs end at the 4th, 7th and 10th step."""
    config = RunConfig(
        model={"model_name_or_path": str(tiny_llama)},
        data={"train": [{"path": str(instructions), "split": "train[:10]"}], "cache_dir": str(tmp_path / "cache")},
        train={"max_steps": 8, "per_device_train_batch_size": 3, "output_dir": str(tmp_path / "run")},
        evaluation={
            "epochs": 1,
            "evaluators": [GENERATION | {"data": write(tmp_path / "rows.jsonl", [PAIR] * 3), "metrics": ["bleu"]}],
        },
    )
    trainer = Trainer(config, observers=())
    results = trainer.train()
    assert {"eval/generation/bleu"} == {name for name in results if name.startswith("eval/")}
    assert trainer.run.facts["eval_samples"] == 3
    assert trainer.run.facts["better"]["eval/generation/bleu"] == "max"
    assert "version" in trainer.details["eval/generation/bleu_signature"]
    names = sorted(path.name for path in (tmp_path / "run" / "predictions").iterdir())
    steps = ("00000004", "00000007", "00000008")
    assert names == [f"generation-step-{step}{end}" for step in steps for end in (".details.json", ".jsonl")]


def test_the_command_shows_numbers_and_what_they_were_computed_with(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    rows = write(tmp_path / "rows.jsonl", [PAIR] * 3)
    path.write_text(
        f"data: {{cache_dir: {tmp_path / 'cache'}}}\ntrain: {{output_dir: {tmp_path / 'run'}}}\n"
        f"evaluation: {{evaluators: [{{type: generation, max_new_tokens: 4, data: {rows}, metrics: [bleu]}}]}}\n"
    )
    assert main(["eval", str(path), "--model", str(tiny_llama), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    signature = found.pop("details")["eval/generation/bleu_signature"]
    assert list(found) == ["eval/generation/bleu"]
    assert main(["eval", str(path), "--model", str(tiny_llama)]) == 0
    assert f"eval/generation/bleu_signature: {signature}" in capsys.readouterr().out
    assert main(["eval", str(path), "--model", str(tiny_llama), "evaluation.evaluators=[perplexity]"]) == 1
    assert "nothing to evaluate" in capsys.readouterr().err


# -- real samples ---------------------------------------------------------------------------------------------------


@pytest.mark.real
def test_benchmarks_people_publish(tmp_path: Path) -> None:
    """GSM8K, rt-polarity and MMLU, as their rows are."""
    text = REAL_DATA / "text"
    if not text.is_dir():
        pytest.skip("no real data here")

    def part(name: str, count: int) -> list[dict[str, str]]:
        return [{"path": str(text / name), "split": f"train[:{count}]"}]

    polarity, mmlu = part("rt_polarity_cls_8000.jsonl", 40), part("mmlu_dev.jsonl", 40)
    evaluators = [
        {**GENERATION, "metrics": ["numeric-match"], "data": part("gsm8k_train_2000.jsonl", 24), "stop": ["\n\n"]},
        *(
            {**CHOICE, "name": f"polarity-{how}", "data": polarity, "normalise": how}
            for how in ("none", "unconditional")
        ),
        {**CHOICE, "name": "mmlu", "data": mmlu},
        {**CHOICE, "name": "mmlu-written", "data": mmlu, "by": "generation", "max_new_tokens": 2},
    ]
    config = RunConfig(
        model={"model_name_or_path": str(REAL_DATA / "stories260K-hf")},
        data={"cache_dir": str(tmp_path / "cache")},
        train={"output_dir": str(tmp_path / "run")},
        evaluation={"evaluators": evaluators, "per_device_eval_batch_size": 8},
    )
    results = Trainer(config, observers=()).evaluate()
    files = predictions(tmp_path)
    assert {name: len(rows) for name, rows in files.items()} == {
        "generation": 24, "polarity-none": 40, "polarity-unconditional": 40, "mmlu": 40, "mmlu-written": 40,
    }  # fmt: skip
    for name in ("polarity-none", "polarity-unconditional", "mmlu", "mmlu-written"):
        hits = sum(row["prediction"] == row["target"] for row in files[name])
        assert results[f"eval/{name}/accuracy"] == pytest.approx(hits / 40)
    assert {row["target"] for row in files["polarity-none"]} == {"negative", "positive"}
    assert all(row["references"][0].count("####") == 1 for row in files["generation"])
