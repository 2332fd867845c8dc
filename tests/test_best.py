"""The best model of a run and early stopping, on several topologies."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from families import read_tensors, write_family
from runs import changed, sections_on
from topologies import world_size_of
from torch import nn
from transformers import AutoModelForCausalLM

from collie_core.api import Batch, ConfigError, Run, RunConfig, Trainer
from collie_core.cli import main

VALUES = [
    3.0,
    1.0,
    2.0,
    float("nan"),
    0.0,
]  # of the evaluations: the second is best, the fourth ends the run


class Watch:
    """A callback that keeps losses, what was saved, and how the run ended."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.saved: list[str] = []
        self.end: tuple[int, str, dict[str, Any]] = (0, "", {})

    def collie_after_step(self, loss: torch.Tensor) -> None:
        self.losses.append(loss.item())

    def collie_checkpoint_saved(self, path: Path) -> None:
        self.saved.append(path.name)

    def collie_run_end(self, run: Run, error: BaseException | None) -> None:
        self.end = (run.step, run.stop_reason, run.best)


def train(topology: str, model: Path, data: Path, output: Path, changes: dict[str, Any]) -> Any:
    """A run of six steps that stops after the fourth. Ranks disagree about the numbers; those of the main one count."""
    sections = changed(sections_on(topology, model, data, output, steps=6, micro_batch=4), changes)
    sections["data"]["eval"] = str(data)
    sections["lr_scheduler"] = {"type": "constant"}
    config = RunConfig(**sections)
    watch = Watch()
    trainer: Trainer

    def eval_fn(model: nn.Module, batches: Iterator[Batch]) -> dict[str, float]:
        return {"score": VALUES[trainer.run.step - 1] + trainer.topology.rank * (-1) ** trainer.run.step}

    trainer = Trainer(config, callbacks=[watch], observers=(), eval_fn=eval_fn)
    trainer.train()
    return watch.losses, watch.saved, watch.end


BEST = {"metric": "eval/score", "mode": "min", "patience": 2}
EVALUATION = {"evaluation.steps": 1, "evaluation.best": BEST}
LORA = {"adapter.type": "lora", "adapter.r": 2, "adapter.init_lora_weights": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("best") / "llama_tied"
    write_family(folder, "llama_tied")
    return folder


@pytest.fixture(scope="module")
def plainly(model: Path, zygote: Any, instructions: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The losses of two and of four steps in one process, without evaluation, and the folders of what they trained."""

    @cache
    def train(lora: bool) -> dict[int, tuple[list[float], Path]]:
        folder = tmp_path_factory.mktemp("plainly")
        args = (model, instructions, folder, LORA if lora else {})
        ((two, four),) = zygote.run(__file__, "train_plainly", world_size=1, args=args)
        return {2: (two, folder / "2" / "run" / "model"), 4: (four, folder / "4" / "run" / "model")}

    return train


def train_plainly(model: Path, data: Path, output: Path, changes: dict[str, Any]) -> list[list[float]]:
    losses = []
    for steps in (2, 4):
        sections = changed(sections_on("dp1", model, data, output / str(steps), steps=steps, micro_batch=4), changes)
        sections["lr_scheduler"] = {"type": "constant"}
        watch = Watch()
        Trainer(RunConfig(**sections), callbacks=[watch], observers=()).train()
        losses.append(watch.losses)
    return losses


def assert_same_weights(found: Path, expected: Path) -> None:
    first, second = read_tensors(found), read_tensors(expected)
    assert first.keys() == second.keys()
    for name, value in second.items():
        torch.testing.assert_close(first[name], value, rtol=0, atol=2e-5, msg=name)


@pytest.mark.filterwarnings("ignore")  # DeepSpeed calls collectives that torch deprecates
@pytest.mark.parametrize(
    ("topology", "changes"),
    [("dp1", {}), ("tp2pp2", {}), ("dp2zero3", {}), ("tp2", LORA)],
    ids=["dp1", "tp2pp2", "dp2zero3", "tp2 with lora"],
)
def test_the_best_model_is_that_of_its_step_on_every_topology(
    topology: str, changes: Any, model: Path, zygote: Any, instructions: Path, tmp_path: Path, plainly: Any
) -> None:
    args = (topology, model, instructions, tmp_path / "run", {**changes, **EVALUATION})
    ranks = zygote.run(__file__, "train", world_size=world_size_of(topology), args=args)
    best = {"step": 2, "metric": "eval/score", "value": 1.0}
    for losses, _, (step, reason, found) in ranks:
        assert (len(losses), step) == (4, 4)
        assert reason == "eval/score did not improve for 2 evaluations; the best, 1, was at step 2"
        assert found.items() >= best.items()
    assert ranks[0][1] == ["best", "best", "model"]
    folder = tmp_path / "run" / "run"
    assert json.loads((folder / "best" / "best.json").read_text()).items() >= best.items()
    for steps, name in ((2, "best"), (4, "model")):
        losses, expected = plainly(bool(changes))[steps]
        torch.testing.assert_close(torch.tensor(ranks[0][0][:steps]), torch.tensor(losses), rtol=0, atol=1e-5)
        assert_same_weights(folder / name, expected)
    if not changes:
        AutoModelForCausalLM.from_pretrained(folder / "best")
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_person_finds_the_same_numbers_everywhere(
    model: Path, instructions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sections: Any = sections_on("dp1", model, instructions, tmp_path, steps=3, micro_batch=4)
    sections["data"]["eval"] = str(instructions)
    sections["evaluation"] = {"steps": 1, "on_start": True, "best": {"metric": "eval/perplexity"}}
    sections["train"] |= {"monitors": ["host", "disk", "network"], "logging_steps": 3}
    sections |= {"report_to": ["csv", "tensorboard"], "optimizer": {"type": "adamw", "lr": 1e-3}}
    file, folder = tmp_path / "run.yaml", tmp_path / "run"
    file.write_text(yaml.safe_dump(sections))
    assert main(["train", str(file)]) == 0
    shown = capsys.readouterr().out

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 1, 2, 2, 3, 3]  # an evaluation has the row of its step before it
    logged = [row for row in rows if "loss" in row]
    assert all(row["host/cpu_percent"] >= 0 and row["network/sent_bytes_per_second"] >= 0 for row in logged)
    assert all(row["tokens_per_second_per_device"] == row["tokens_per_second"] for row in logged)
    assert logged[-1]["tokens"] > logged[0]["tokens"]
    with (folder / "metrics.csv").open(newline="") as table:
        written = list(csv.DictReader(table))
    assert [{name: float(cell) for name, cell in row.items() if cell} for row in written] == rows

    values = [row["eval/perplexity"] for row in rows if "eval/perplexity" in row]
    best = json.loads((folder / "best" / "best.json").read_text())
    assert best == {"step": 3, "epoch": rows[-1]["epoch"], "metric": "eval/perplexity", "value": min(values)}
    assert json.loads((folder / "summary.json").read_text())["best"] == best
    assert re.search(r"step 3/3  eval\n  loss +[\d.]+ +-[\d.e-]+  best so far\n  perplexity ", shown)
    assert f"best      {folder}/best (eval/perplexity {min(values):#.4g} at step 3)" in shown
    used = {row["name"] for row in json.loads((folder / "plugins.json").read_text())}
    assert {"csv", "tensorboard"} <= used
    assert main(["eval", str(file), "--model", str(folder / "best"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["eval/perplexity"] == pytest.approx(best["value"], rel=1e-6)


def test_without_samples_it_is_refused_before_the_run(model: Path, instructions: Path, tmp_path: Path) -> None:
    sections = changed(sections_on("dp1", model, instructions, tmp_path, steps=6, micro_batch=4), EVALUATION)
    with pytest.raises(ConfigError, match=r"evaluation\.best.*: there is nothing to evaluate on"):
        Trainer(RunConfig(**sections), observers=()).train()
    assert not (tmp_path / "run").exists()


def stop_from_the_main_rank(model: Path, data: Path, output: Path) -> int:
    """A hook that hears of evaluations on the main rank only asks to stop."""

    class Enough:
        def collie_evaluated(self, run: Run) -> None:
            run.request_stop("it is good enough")

    sections = sections_on("dp2", model, data, output, steps=6, micro_batch=4)
    sections["data"]["eval"] = str(data)
    sections["evaluation"] = {"steps": 2}
    trainer = Trainer(RunConfig(**sections), callbacks=[Enough()], observers=())
    trainer.train()
    return trainer.run.step


def test_every_rank_stops_when_a_hook_of_the_main_rank_asks(
    model: Path, zygote: Any, instructions: Path, tmp_path: Path
) -> None:
    args = (model, instructions, tmp_path)
    assert zygote.run(__file__, "stop_from_the_main_rank", world_size=2, args=args) == [2, 2]
