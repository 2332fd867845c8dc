"""New tokens on every topology, against transformers' resized model with its rows set by hand in a plain torch loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import read_tensors, reference, write_family
from plain import PlainRun
from runs import Record, largest_difference, sections_on
from topologies import sizes_of, world_size_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from collie_core.api import CollieError, RunConfig, Trainer
from collie_core.cli import main
from collie_core.data.tokenizer import byte_tokenizer
from collie_core.generate import load_for_generation

STEPS, BATCH, SEED, LR = 4, 8, 7, 1e-2
OLD, SIZE = 259, 265  # odd, and with rows that no token has
TOKENS = ["Count to", " 1 2 3", "é!"]
RESIZE: dict[str, Any] = {"tokens": TOKENS, "size": 263, "multiple_of": 5}
LORA: dict[str, Any] = {
    "type": "lora",
    "r": 4,
    "target_modules": ["q_proj", "down_proj"],
    "modules_to_save": ["embed_tokens", "lm_head"],
}
FAMILIES = {"internlm2": ["model.tok_embeddings.weight", "output.weight"], "llama_tied": ["model.embed_tokens.weight"]}
"""The matrices with a row for each token, as the files name them; the second family has one for both ends."""


class Start(Record):
    """Keeps the weights before the first step, too."""

    trainer: Trainer

    def __init__(self, folder: Path | None) -> None:
        super().__init__()
        self.folder = folder

    def collie_run_start(self, run: Any) -> None:
        if self.folder is not None:
            self.trainer.save_model(self.folder)


def train(topology: str, model: Path, data: Path, output: Path, adapter: dict[str, Any] | None) -> list[float]:
    sections = sections_on(topology, model, data, output, steps=STEPS, micro_batch=BATCH)
    sections["model"]["resize_vocabulary"] = RESIZE
    sections["optimizer"] = {"type": "adamw", "lr": LR, "weight_decay": 0.01}
    sections["lr_scheduler"] = {"type": "cosine", "warmup_ratio": 0.0}  # as a tenth of so few steps in `PlainRun`
    if adapter is not None:
        sections["adapter"] = adapter
    record = Start(output / "start" if adapter is None else None)
    record.trainer = Trainer(RunConfig(**sections), callbacks=[record], observers=())
    record.trainer.train()
    return record.losses


def train_all(topology: str, folder: Path, data: Path, output: Path, cases: dict[str, Any]) -> dict[str, list[float]]:
    """Losses of every case: name -> (family, adapter)."""
    return {
        name: train(topology, folder / family, data, output / name, adapter)
        for name, (family, adapter) in cases.items()
    }


CASES: dict[str, tuple[str, dict[str, Any] | None]] = {
    "internlm2": ("internlm2", None),
    "llama_tied": ("llama_tied", None),
    "lora": ("internlm2", LORA),
}
WITH_ADAPTER = ["tp2", "pp2", "dp2zero3"]


# -- by hand --------------------------------------------------------------------------------------------------------


def with_new_rows(matrix: torch.Tensor) -> torch.Tensor:
    """The byte tokenizer's ids are bytes, so a token's pieces are its bytes."""
    old = matrix[:OLD].double()
    rows = [old[list(token.encode())].mean(0) for token in TOKENS]
    rows += [old.mean(0)] * (SIZE - OLD - len(TOKENS))
    return torch.cat([matrix[:OLD], torch.stack(rows).to(matrix.dtype)])


def resized(folder: Path, family: str) -> Any:
    model: Any = reference(folder, family)
    matrices = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    values = [with_new_rows(matrix.detach()) for matrix in matrices]
    model.resize_token_embeddings(SIZE, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(values[0])
        model.get_output_embeddings().weight.copy_(values[1])
    return model


def with_lora(model: Any) -> Any:
    torch.manual_seed(SEED)
    options = {key: value for key, value in LORA.items() if key != "type"}
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    model.eval()
    return model(torch.arange(OLD - 30, OLD + len(TOKENS))[None]).logits


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random checkpoint of each family, and the tokenizer with the new tokens."""
    folder = tmp_path_factory.mktemp("families")
    for name in FAMILIES:
        write_family(folder / name, name)
    tokenizer = byte_tokenizer()
    assert tokenizer.add_tokens(TOKENS) == len(TOKENS)
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def plain(families: Path, instructions: Path) -> dict[str, tuple[PlainRun, torch.Tensor]]:
    """The same in transformers, peft and plain torch: what came out, and logits at the end."""
    found = {}
    for name, (family, adapter) in CASES.items():
        model = resized(families / family, family)
        model = model if adapter is None else with_lora(model)
        run = PlainRun(steps=STEPS, batch=BATCH, lr=LR).train(model, families / "tokenizer", instructions)
        found[name] = (run, logits(model))
    return found


# -- on every topology ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # DeepSpeed calls collectives that torch deprecates
@pytest.mark.parametrize("topology", ["dp1", "tp2", "pp2", "tp2pp2", "dp2zero3"])
def test_a_topology_trains_new_tokens_as_transformers_does(
    topology: str, zygote: Any, families: Path, plain: Any, instructions: Path, tmp_path: Path
) -> None:
    cases = {name: case for name, case in CASES.items() if case[1] is None or topology in WITH_ADAPTER}
    args = (topology, families, instructions, tmp_path, cases)
    ranks = zygote.run(__file__, "train_all", world_size=world_size_of(topology), args=args, limit_s=300)
    for name, (family, adapter) in cases.items():
        run, expected = plain[name]
        assert all(rank[name] == ranks[0][name] for rank in ranks), name
        assert largest_difference(ranks[0][name], run.losses) <= 1e-5, name
        assert run.losses[-1] < run.losses[0]
        saved = tmp_path / name / "run" / "model"
        if adapter is None:
            check_start(families / family, tmp_path / name / "start", FAMILIES[family])
            loaded = reference(saved, family)
            assert json.loads((saved / "config.json").read_text())["vocab_size"] == SIZE
        else:
            base: Any = reference(families / family, family)
            base.resize_token_embeddings(SIZE)  # at random
            loaded = peft.PeftModel.from_pretrained(base, str(saved))
        torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-4)
        assert AutoTokenizer.from_pretrained(saved).tokenize("Count to é!") == ["Count to", "Ġ", "é!"]


def check_start(files: Path, start: Path, matrices: list[str]) -> None:
    """Every bit of the weights before the first step."""
    before, after = read_tensors(files), read_tensors(start)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(after[key], with_new_rows(value) if key in matrices else value), key


def test_an_export_loads_in_plain_transformers(families: Path, instructions: Path, tmp_path: Path) -> None:
    train("dp1", families / "llama_tied", instructions, tmp_path, None)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "start")
    torch.testing.assert_close(logits(loaded), logits(resized(families / "llama_tied", "llama_tied")))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "start")) == OLD + len(TOKENS)


# -- an adapter afterwards ------------------------------------------------------------------------------------------


def perplexity(topology: str, saved: Path, data: Path, output: Path) -> float:
    sizes = sizes_of(topology)
    config = RunConfig(
        model={"model_name_or_path": str(saved)},
        data={"eval": str(data), "max_length": 256, "cache_dir": str(output / "cache")},
        parallel={"tensor_parallel_size": sizes["tp"], "pipeline_parallel_size": sizes["pp"]},
        train={"output_dir": str(output / "run")},
    )
    return Trainer(config, observers=()).evaluate()["eval/perplexity"]


@pytest.mark.filterwarnings("ignore")
def test_a_saved_adapter_brings_its_vocabulary(
    zygote: Any, families: Path, instructions: Path, tmp_path: Path, capsys: Any
) -> None:
    base = families / "internlm2"
    # One whose matrices are frozen: the new rows are made again from the base model's files.
    frozen = {key: value for key, value in LORA.items() if key != "modules_to_save"}
    for name, adapter in {"trained": LORA, "frozen": frozen}.items():
        train("dp1", base, instructions, tmp_path / name, adapter)
        saved = tmp_path / name / "run" / "model"
        by_peft = peft.PeftModel.from_pretrained(resized(base, "internlm2"), str(saved))
        expected = logits(by_peft)
        model, tokenizer = load_for_generation(str(saved))
        torch.testing.assert_close(logits(model.float()), expected, rtol=0, atol=1e-5)
        assert len(tokenizer) == OLD + len(TOKENS)
        merged = tmp_path / f"merged-{name}"
        assert main(["merge", "--adapter", str(saved), "--out", str(merged), "--verify"]) == 0
        torch.testing.assert_close(logits(reference(merged, "internlm2")), expected, rtol=0, atol=1e-4)
        assert len(AutoTokenizer.from_pretrained(merged)) == OLD + len(TOKENS)
    saved = tmp_path / "trained" / "run" / "model"
    args = (saved, instructions, tmp_path)
    ((alone,), *others) = (
        zygote.run(__file__, "perplexity", world_size=world_size_of(name), args=(name, *args))
        for name in ("dp1", "pp2")
    )
    assert [value for ranks in others for value in ranks] == pytest.approx([alone] * 2, rel=1e-5)
    by_peft = peft.PeftModel.from_pretrained(resized(base, "internlm2"), str(saved), is_trainable=True)
    run = PlainRun(steps=STEPS, batch=BATCH, lr=LR).train(by_peft, families / "tokenizer", instructions)
    go_on = {"type": "lora", "adapter_name_or_path": str(saved)}
    cases = {"going-on": ("internlm2", go_on)}
    ranks = zygote.run(__file__, "train_all", world_size=2, args=("tp2", families, instructions, tmp_path, cases))
    assert largest_difference(ranks[0]["going-on"], run.losses) <= 1e-5


# -- what is refused ------------------------------------------------------------------------------------------------


def refused(model: Path, data: Path, output: Path, resize: Any, **sections: Any) -> str:
    sections |= {
        "model": {"model_name_or_path": str(model), "resize_vocabulary": resize},
        "data": {"train": str(data), "cache_dir": str(output / "cache")},
        "train": {"max_steps": 1, "output_dir": str(output / "run")},
    }
    with pytest.raises(CollieError) as caught:
        Trainer(RunConfig(**sections), observers=()).train()
    assert not (output / "run").exists()
    return str(caught.value)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_bad_input_is_one_sentence(families: Path, instructions: Path, tmp_path: Path) -> None:
    args = (families / "internlm2", instructions, tmp_path)
    assert "the tokenizer has 'a', '<eos>' already; leave it out" in refused(*args, {"tokens": ["a", "new", "<eos>"]})
    assert "size=260 is below what the tokenizer needs, 261" in refused(*args, {"tokens": ["xy", "yz"], "size": 260})
    assert "must name each token once, and there is more than one 'xy'" in refused(*args, {"tokens": ["xy", "xy"]})
    assert "must have at least 1 character" in refused(*args, {"tokens": [""]})
    tied = (families / "llama_tied", instructions, tmp_path)
    assert "embedding and head are one matrix (tie_word_embeddings)" in refused(*tied, RESIZE, adapter=LORA)
    wide = tmp_path / "wide"  # more rows than its tokenizer has tokens
    write_family(wide, "internlm2", changes={"vocab_size": 300})
    said = refused(wide, instructions, tmp_path, {"tokens": ["xy"], "size": 290})
    assert "size=290 is below the 300 rows of the model's files" in said
    narrow = tmp_path / "narrow"  # fewer
    write_family(narrow, "internlm2", changes={"vocab_size": 258})
    said = refused(narrow, instructions, tmp_path, {"tokens": []})
    assert "the model has no rows for '<|im_start|>' of the tokenizer, and their pieces are not known" in said


def test_an_adapter_with_another_vocabulary_is_refused(families: Path, instructions: Path, tmp_path: Path) -> None:
    base = families / "internlm2"
    train("dp1", base, instructions, tmp_path / "saved", LORA)
    saved = tmp_path / "saved" / "run" / "model"
    go_on = {"type": "lora", "adapter_name_or_path": str(saved)}
    for resize in (None, {"tokens": TOKENS}):
        said = refused(base, instructions, tmp_path, resize, adapter=go_on)
        assert "was trained with another, to 265 rows; set it as it was then" in said
    assert "holds an adapter, whose vocabulary is" in refused(saved, instructions, tmp_path, RESIZE)
    handed_in = {"model": {"model_name_or_path": str(base), "resize_vocabulary": RESIZE}, "data": {"train": "x"}}
    with pytest.raises(CollieError, match="a model that is handed in has its rows already"):
        Trainer(RunConfig(**handed_in), model=torch.nn.Linear(1, 1))
