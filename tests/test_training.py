"""A run from its configuration to its export, as a person and as a program start it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from combos import more
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from collie_core.api import Batch, DataError, ModelError, Run, RunConfig, RunError, Trainer
from collie_core.cli import main

Sections = dict[str, dict[str, Any]]


@pytest.fixture
def sections(tiny_llama: Path, instructions: Path, tmp_path: Path) -> Sections:
    return {
        "model": {"model_name_or_path": str(tiny_llama)},
        "data": {
            "train": [{"path": str(instructions), "split": "train[:80%]"}],
            "eval": [{"path": str(instructions), "split": "train[80%:]"}],
            "max_length": 256,
            "cache_dir": str(tmp_path / "cache"),
        },
        "train": {"max_steps": 4, "per_device_train_batch_size": 4, "output_dir": str(tmp_path / "run")},
        "optimizer": {"type": "adamw", "lr": 3e-3},
        "evaluation": {"steps": 2, "on_start": True, "print_samples": 1},
    }


def write_yaml(sections: Sections, path: Path) -> Path:
    path.write_text(yaml.safe_dump(sections))
    return path


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# -- the command line ---------------------------------------------------------------------------------------


def test_train_eval_and_generate(sections: Sections, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sections["report_to"] = ["tensorboard"]  # type: ignore[assignment]
    path = write_yaml(sections, tmp_path / "run.yaml")
    assert main(["train", str(path), "train.max_steps=6", "--train.logging_steps", "2"]) == 0
    shown = capsys.readouterr().out
    assert "One sample" in shown
    assert "step 6/6" in shown
    assert f"--model {tmp_path / 'run' / 'model'}" in shown

    run = tmp_path / "run"
    for name in ("config.yaml", "plugins.json", "environment.json", "metrics.jsonl", "report.html", "model"):
        assert (run / name).exists(), name
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    assert RunConfig.from_yaml(run / "config.yaml").train.max_steps == 6
    used = {(row["kind"], row["name"], row["distribution"]) for row in json.loads((run / "plugins.json").read_text())}
    assert {("model", "llama", "collie-llama"), ("optimizer", "adamw", "collie-core")} <= used

    rows = rows_of(run)
    logged = [row for row in rows if "loss" in row]
    assert [row["step"] for row in logged] == [2, 4, 6]
    assert {
        "epoch",
        "learning_rate",
        "grad_norm",
        "tokens",
        "tokens_per_second",
        "step_time_s",
        "peak_memory_bytes",
    } <= (logged[0].keys())
    evaluated = [row for row in rows if "eval/perplexity" in row]
    assert [row["step"] for row in evaluated] == [0, 2, 4, 6]
    assert evaluated[-1]["eval/perplexity"] < evaluated[0]["eval/perplexity"]

    assert main(["eval", str(path), "--model", str(run / "model"), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["eval/perplexity"] == pytest.approx(evaluated[-1]["eval/perplexity"], rel=1e-6)

    arguments = ["generate", "Count to 3: ", "--model", str(run / "model"), "--max-new-tokens", "5"]
    assert main(arguments) == 0
    greedy = capsys.readouterr().out
    assert main(arguments) == 0
    assert capsys.readouterr().out == greedy
    sampled = []
    for seed in ("1", "1", "2"):
        assert main([*arguments, "--temperature", "2", "--seed", seed]) == 0
        sampled.append(capsys.readouterr().out)
    assert sampled[0] == sampled[1] != sampled[2]


def test_greedy_generation_is_that_of_transformers(sections: Sections, tmp_path: Path, capsys: Any) -> None:
    folder = sections["model"]["model_name_or_path"]
    assert main(["generate", "Count to 7: ", "--model", folder, "--max-new-tokens", "12"]) == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Count to 7: ", return_tensors="pt").input_ids
    output = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert capsys.readouterr().out == tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True) + "\n"


def test_a_used_folder_is_refused_and_replaced_on_request(sections: Sections, tmp_path: Path, capsys: Any) -> None:
    sections["train"]["max_steps"] = 1
    path = write_yaml(sections, tmp_path / "run.yaml")
    assert main(["train", str(path)]) == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert main(["train", str(path)]) == 1
    assert "overwrite_output_dir" in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    assert main(["train", str(path), "train.overwrite_output_dir=true"]) == 0


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("data", "train", "missing.jsonl", "missing.jsonl"),
        ("model", "model_name_or_path", "/nowhere/at/all", "/nowhere/at/all"),
        ("data", "max_length", 100_000, "max_position_embeddings"),
    ],
)
def test_what_cannot_start_says_one_sentence_and_leaves_nothing(
    section: str, key: str, value: Any, said: str, sections: Sections, tmp_path: Path, capsys: Any
) -> None:
    sections[section][key] = value
    assert main(["train", str(write_yaml(sections, tmp_path / "run.yaml"))]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


# -- the program --------------------------------------------------------------------------------------------


def test_the_export_gives_the_logits_of_the_trained_model(sections: Sections, tmp_path: Path) -> None:
    trainer = Trainer(RunConfig(**sections), observers=())
    trainer.train()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    ids = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")("Count to 5: 1 2", return_tensors="pt").input_ids
    with torch.no_grad():
        trained = trainer.model.eval()(ids).logits
        assert torch.equal(loaded.eval()(ids).logits, trained)


def test_the_same_seed_gives_the_same_run_and_leaves_the_random_state(sections: Sections) -> None:
    sections["train"]["overwrite_output_dir"] = True
    torch.manual_seed(123)
    expected = torch.rand(1)
    results = []
    for _ in range(2):
        torch.manual_seed(123)
        results.append(Trainer(RunConfig(**sections), observers=()).train())
        assert torch.equal(torch.rand(1), expected)
    assert results[0]["loss"] == results[1]["loss"]
    assert results[0]["eval/loss"] == results[1]["eval/loss"]


class Events:
    """Writes down what it hears."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def collie_run_start(self, run: Run) -> None:
        self.heard.append("start")
        run.metrics["mine"] = 5.0

    def collie_before_step(self, batch: Any) -> None:
        self.heard.append("before")

    def collie_before_update(self, run: Run) -> None:
        assert any(parameter.grad is not None for parameter in run.model.parameters())
        self.heard.append("update")

    def collie_after_step(self, run: Run, loss: Tensor) -> None:
        self.heard.append("after")
        if run.step == 2:
            run.request_stop("enough")

    def collie_metrics(self, values: dict[str, Any]) -> None:
        self.heard.append(f"metrics {values.get('mine')}")

    def collie_evaluated(self, results: dict[str, float]) -> None:
        assert set(results) == {"eval/loss", "eval/perplexity"}
        self.heard.append("evaluated")

    def collie_checkpoint_saved(self, path: Path) -> None:
        self.heard.append(path.name)

    def collie_run_end(self, error: BaseException | None) -> None:
        self.heard.append(f"end {error}")


def test_a_callback_hears_the_run_in_order_and_can_stop_it(sections: Sections) -> None:
    sections["evaluation"] = {}
    events = Events()
    Trainer(RunConfig(**sections), callbacks=[events], observers=()).train()
    step = ["before", "update", "after"]
    assert events.heard == [
        "start", *step, "metrics 5.0", *step, "metrics None", "evaluated", "model", "end None"
    ]  # fmt: skip


def test_an_error_in_a_hook_stops_the_run_and_its_end_is_told(sections: Sections) -> None:
    class Broken(Events):
        def collie_after_step(self, run: Run, loss: Tensor) -> None:
            raise RunError("the disk is on fire")

    events = Broken()
    with pytest.raises(RunError, match="on fire"):
        Trainer(RunConfig(**sections), callbacks=[events], observers=()).train()
    assert events.heard[-1] == "end the disk is on fire"


def test_targets_that_a_hook_masks_are_not_counted(sections: Sections) -> None:
    """The mean over the targets that are left is that of a run whose other half was never there."""

    class Masking(Events):
        def collie_before_step(self, batch: Any) -> None:
            (only,) = batch.micro_batches
            only.labels[2:] = -100
            kept = only.input_ids[:2], only.labels[:2]
            self.kept = Batch(*kept)

        def collie_before_update(self, run: Run) -> None: ...

        def collie_after_step(self, run: Run, loss: Tensor) -> None:
            self.loss = loss.item()

    sections["evaluation"] = {}
    sections["train"] |= {"max_steps": 1}
    masking, model = Masking(), LlamaForCausalLM.from_pretrained(sections["model"]["model_name_or_path"])
    Trainer(RunConfig(**sections), callbacks=[masking], observers=()).train()
    expected = model(input_ids=masking.kept.input_ids, labels=masking.kept.labels).loss.item()
    assert masking.loss == pytest.approx(expected, rel=1e-6)


def test_every_part_can_be_handed_in(tiny_llama: Path, tmp_path: Path) -> None:
    """Only sizes come from the configuration; each part is seen at work."""
    seen: set[str] = set()
    model = LlamaForCausalLM.from_pretrained(tiny_llama)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    before = model.lm_head.weight.detach().clone()
    rows = [{"input": f"{number}+{number}=", "output": str(2 * number)} for number in range(12)]

    def optimizer(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        seen.add("optimizer")
        return torch.optim.SGD(groups, lr=0.5)

    def scheduler(optimizer: torch.optim.Optimizer, max_steps: int) -> Any:
        seen.add(f"scheduler over {max_steps}")
        return torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)

    def loss_fn(outputs: Any, labels: Tensor, target_tokens: int) -> Tensor:
        seen.add("loss_fn")
        logits = outputs.logits[:, :-1]
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="sum")
        return losses / target_tokens

    def eval_fn(model: nn.Module, batches: Iterator[Batch]) -> dict[str, float]:
        return {"batches": len(list(batches)), "answer": 42.0}

    config = RunConfig(
        data={"max_length": 64},
        train={"num_train_epochs": 1, "per_device_train_batch_size": 4, "output_dir": str(tmp_path / "run")},
    )
    results = Trainer(
        config,
        model=model,
        tokenizer=tokenizer,
        train_dataset=rows,
        eval_dataset=rows[:5],
        optimizer=optimizer,
        lr_scheduler=scheduler,
        loss_fn=loss_fn,
        eval_fn=eval_fn,
        observers=(),
    ).train()
    assert seen == {"optimizer", "scheduler over 3", "loss_fn"}
    assert results["eval/batches"] == 2.0
    assert results["eval/answer"] == 42.0
    assert not torch.equal(model.lm_head.weight, before)


def test_an_optimizer_and_scheduler_made_beforehand(tiny_llama: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_llama)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 0.5, total_iters=100)
    config = RunConfig(train={"max_steps": 2, "output_dir": str(tmp_path / "run")}, data={"max_length": 64})
    results = Trainer(
        config,
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(tiny_llama),
        train_dataset=[{"text": "hello there"}] * 4,
        optimizer=optimizer,
        lr_scheduler=scheduler,
        observers=(),
    ).train()
    assert results["learning_rate"] == 5e-4


def test_train_fn_replaces_forward_and_loss(sections: Sections) -> None:
    def train_fn(model: nn.Module, batch: Batch, target_tokens: int) -> Tensor:
        return model(batch.input_ids).logits.square().mean()

    sections["evaluation"] = {}
    results = Trainer(RunConfig(**sections), train_fn=train_fn, observers=()).train()
    assert 0 < results["loss"] < 1  # no cross-entropy over 258 tokens begins there


def test_nothing_to_train_or_to_train_on_is_said(tiny_llama: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_llama).requires_grad_(False)
    config = RunConfig(train={"max_steps": 1, "output_dir": str(tmp_path / "run")}, data={"max_length": 64})
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    with pytest.raises(RunError, match="no trainable parameter"):
        Trainer(config, model=model, tokenizer=tokenizer, train_dataset=[{"text": "a b"}], observers=()).train()
    with pytest.raises(DataError):
        Trainer(config, model=model, tokenizer=tokenizer, train_dataset=[], observers=()).train()


def test_packing_is_refused_for_a_model_that_mixes_samples(tmp_path: Path) -> None:
    from transformers import GPTJConfig, GPTJForCausalLM

    class Forgetful(GPTJForCausalLM):
        def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, **options: Any) -> Any:
            return super().forward(input_ids, **options)

    model = Forgetful(GPTJConfig(vocab_size=258, n_embd=16, n_layer=1, n_head=2, rotary_dim=4, n_positions=64))
    config = RunConfig(
        data={"max_length": 64, "packing": True},
        tokenizer="byte",
        train={"max_steps": 1, "output_dir": str(tmp_path / "run")},
    )
    with pytest.raises(ModelError, match=r"data\.packing=false"):
        Trainer(config, model=model, train_dataset=[{"text": "a b c"}], observers=()).train()


# -- real input ---------------------------------------------------------------------------------------------

REAL = {
    "gsm8k": ("gsm8k_train_2000.jsonl", {}),
    "alpaca": ("alpaca_en_700.jsonl", {}),
    "chat": ("chat_toolcall_200.jsonl", {"chat_template": "chatml"}),
    "chat packed": ("chat_toolcall_200.jsonl", {"chat_template": "chatml", "packing": True}),
    "shakespeare": ("shakespeare_text.jsonl", {"long_samples": "split"}),
    "shakespeare packed": ("shakespeare_text.jsonl", {"long_samples": "split", "packing": True}),
}


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [*map(more, ("gsm8k", "chat packed", "alpaca", "chat", "shakespeare", "shakespeare packed"))]
)
def test_real_weights_learn_real_texts(name: str, real_data: Path, tmp_path: Path) -> None:
    file, options = REAL[name]
    path = str(real_data / "text" / file)
    config = RunConfig(
        model={"model_name_or_path": str(real_data / "stories260K-hf")},
        data={
            "train": [{"path": path, "split": "train[:90%]"}],
            "eval": [{"path": path, "split": "train[90%:]"}],
            "max_length": 512,
            "cache_dir": str(tmp_path / "cache"),
            **options,
        },
        train={"max_steps": 20, "per_device_train_batch_size": 8, "output_dir": str(tmp_path / "run")},
        optimizer={"type": "adamw", "lr": 2e-3},
        lr_scheduler={"type": "cosine", "warmup_ratio": 0.1},
        evaluation={"on_start": True, "per_device_eval_batch_size": 16},
    )
    trainer = Trainer(config)
    trainer.train()
    rows = rows_of(tmp_path / "run")
    losses = [row["loss"] for row in rows if "loss" in row]
    perplexities = [row["eval/perplexity"] for row in rows if "eval/perplexity" in row]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert perplexities[-1] < 0.7 * perplexities[0]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, trainer.model.eval()(ids).logits)


def test_lora_trains_its_own_weights_alone_and_its_folder_is_a_model(
    sections: Sections, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import PeftModel

    sections["adapter"] = {"type": "lora", "r": 4, "target_modules": ["q_proj", "v_proj"]}
    sections["optimizer"]["lr"] = 3e-2
    path = write_yaml(sections, tmp_path / "run.yaml")
    assert main(["train", str(path)]) == 0
    assert "trained" in capsys.readouterr().out
    folder = tmp_path / "run" / "model"
    assert (folder / "adapter_model.safetensors").exists()
    assert not (folder / "model.safetensors").exists()

    expected = rows_of(tmp_path / "run")[-1]["eval/perplexity"]
    assert main(["eval", str(path), "--model", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["eval/perplexity"] == pytest.approx(expected, rel=1e-5)

    assert main(["generate", "Count to 4: ", "--model", str(folder), "--max-new-tokens", "6"]) == 0
    base = LlamaForCausalLM.from_pretrained(sections["model"]["model_name_or_path"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Count to 4: ", return_tensors="pt").input_ids
    theirs = PeftModel.from_pretrained(base, folder)
    output = theirs.generate(input_ids=ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert capsys.readouterr().out == tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True) + "\n"


def test_lion_is_a_pack_like_any_other(sections: Sections, tmp_path: Path) -> None:
    sections["optimizer"] = {"type": "lion", "lr": 1e-3}
    Trainer(RunConfig(**sections)).train()
    rows = [row for row in rows_of(tmp_path / "run") if "eval/loss" in row]
    assert rows[-1]["eval/loss"] < rows[0]["eval/loss"]
    used = json.loads((tmp_path / "run" / "plugins.json").read_text())
    assert any(row["name"] == "lion" and row["distribution"] == "collie-optim" for row in used)


def test_a_chat_template_of_the_run_is_exported(sections: Sections, tmp_path: Path, tiny_llama: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}] * 8
    sections["data"] = {"max_length": 128, "chat_template": "chatml"}
    sections["evaluation"] = {}
    Trainer(RunConfig(**sections), train_dataset=rows, observers=()).train()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert "assistant" in tokenizer.apply_chat_template(rows[0]["messages"], tokenize=False)


def test_evaluation_needs_no_training_data(sections: Sections, tmp_path: Path, capsys: Any) -> None:
    del sections["data"]["train"]
    path = write_yaml(sections, tmp_path / "run.yaml")
    assert main(["eval", str(path)]) == 0
    assert "eval/perplexity" in capsys.readouterr().out
    assert main(["train", str(path)]) == 2
    assert "data.train" in capsys.readouterr().err


def test_a_trainer_trains_once(sections: Sections) -> None:
    sections["train"] |= {"overwrite_output_dir": True, "max_steps": 1}
    trainer = Trainer(RunConfig(**sections), observers=())
    trainer.train()
    with pytest.raises(RunError, match="has trained already"):
        trainer.train()


@pytest.mark.filterwarnings("ignore")  # DeepSpeed calls collectives that torch deprecates
@pytest.mark.parametrize("zero_stage", [0, 2])
def test_dropout_is_on_in_training_off_in_evaluation_and_follows_the_seed(zero_stage: int, sections: Sections) -> None:
    trained_in, evaluated_in = set(), set()

    def eval_fn(model: nn.Module, batches: Iterator[Batch]) -> dict[str, float]:
        evaluated_in.update(module.training for module in list(model.modules())[1:])  # an engine itself has no mode
        return {"nothing": 0.0}

    def losses(seed: int, dropout: float) -> list[float]:
        sections["adapter"] = {"type": "lora", "lora_dropout": dropout, "init_lora_weights": False}
        sections["train"] |= {"overwrite_output_dir": True, "seed": seed}
        sections["parallel"] = {"zero_stage": zero_stage}
        heard: list[float] = []

        class Losses:
            def collie_after_step(self, run: Run, loss: Tensor) -> None:
                trained_in.add(run.model.training)
                heard.append(loss.item())

        Trainer(RunConfig(**sections), callbacks=[Losses()], eval_fn=eval_fn, observers=()).train()
        return heard

    dropped = losses(1, 0.5)
    assert losses(1, 0.5) == dropped
    assert losses(1, 0.0) != dropped
    assert (trained_in, evaluated_in) == ({True}, {False})
