"""The promise of `collie compare`: one command, every cell an ordinary run, and after a kill only what is missing."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from combos import more

from collie_core.compare.grid import Asked, Grid, Pair
from collie_testkit.zygote import RanksFailed

TOLERANCE = 0.03  # of the measured peak
STEPS = 3


def compare(arguments: list[str], dies_in: str = "") -> int:
    """`collie compare` in this process, which is killed at the second save of a cell."""
    from collie_core.checkpoint.run import Checkpoints
    from collie_core.cli import main

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    save, here = Checkpoints.save, os.getpid()

    def save_or_die(self: Any, run: Any, *rest: Any) -> None:
        if dies_in and dies_in in str(run.output_dir) and run.step == 2:
            os.kill(here, signal.SIGKILL)
            signal.pause()  # until the end of its parent reaches it
        save(self, run, *rest)

    Checkpoints.save = save_or_die  # type: ignore[method-assign]  (this process is this comparison's alone)
    return main(["compare", *arguments])


def write_file(folder: Path, model: Path, data: Path, **more_sections: Any) -> Path:
    sections = {
        "model": {"model_name_or_path": str(model)},
        "data": {
            "train": {"path": str(data), "split": "train[:30]"},
            "eval": {"path": str(data), "split": "train[30:34]"},
            "max_length": 256,
            "cache_dir": str(folder / "cache"),
        },
        "train": {"max_steps": STEPS, "per_device_train_batch_size": 2, "max_grad_norm": 0},
        "lr_scheduler": "constant",
        **more_sections,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def report_of(folder: Path) -> Any:
    return json.loads((folder / "report.json").read_text())


def assert_comparable(report: Any) -> None:
    """Same samples for all; the plan holds; every number is there."""
    assert {(cell["status"], cell["steps"]) for cell in report["cells"]} == {("done", STEPS)}
    assert len({cell["tokens"] for cell in report["cells"]}) == 1
    for choice in report["ranking"]:
        assert choice["predicted_peak_bytes"] == pytest.approx(choice["measured_peak_bytes"], rel=TOLERANCE)
        assert choice["numbers"]["eval/loss"]["n"] == 1
    losses = [choice["numbers"]["eval/loss"]["mean"] for choice in report["ranking"]]
    assert losses == sorted(losses)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_after_a_kill_only_what_is_missing_is_done(
    tiny_llama: Path, instructions: Path, zygote: Any, tmp_path: Path
) -> None:
    checkpoint = {"save_steps": 1, "save_total_limit": 1, "asynchronous": False}
    path, output = write_file(tmp_path, tiny_llama, instructions, checkpoint=checkpoint), tmp_path / "compared"
    words = [str(path), "--optimizers", "adamw,lomo", "--output", str(output)]
    with pytest.raises(RanksFailed, match="exit -9"):
        zygote.run(__file__, "compare", world_size=1, args=(words, "lomo-none"))
    standing = {
        path: path.stat().st_mtime_ns for name in ("cells", "memory") for path in (output / name).glob("*.json")
    }
    names = {path.stem for path in standing}
    assert names == {"adamw-none-lr0.0001-seed42", "adamw-none", "lomo-none"}
    assert zygote.run(__file__, "compare", world_size=1, args=(words,)) == [0]
    assert {path: path.stat().st_mtime_ns for path in standing} == standing
    assert_comparable(report_of(output))
    half = (output / "cells" / "lomo-none-lr0.01-seed42.log").read_text()
    assert [half.count(f"step {step}/{STEPS}  loss") for step in (1, 2, 3)] == [1, 2, 1]  # on from the first checkpoint
    rows = (output / "cells" / "lomo-none-lr0.01-seed42" / "metrics.jsonl").read_text().splitlines()
    first = [json.loads(row)["loss"] for row in rows if "loss" in json.loads(row)]
    other = (output / "cells" / "adamw-none-lr0.0001-seed42" / "metrics.jsonl").read_text().splitlines()
    assert first[0] == json.loads(other[0])["loss"]
    assert len(first) == STEPS


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.timeout(900)  # the whole takes 76 seconds of a processor
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("optimizers", "adapters"),
    [more("sophia,adalomo", "lora"), more("adamw,lion,adan,sophia,lomo,adalomo", "none,lora")],
)
def test_real_weights_and_rows_from_one_command(
    optimizers: str, adapters: str, real_data: Path, zygote: Any, tmp_path: Path
) -> None:
    path = write_file(tmp_path, real_data / "stories260K-hf", real_data / "text" / "gsm8k_train_2000.jsonl")
    output = tmp_path / "compared"
    words = [str(path), "--optimizers", optimizers, "--adapters", adapters, "--output", str(output)]
    assert zygote.run(__file__, "compare", world_size=1, args=(words,), limit_s=800) == [0]
    report = report_of(output)
    pairs = {(choice["optimizer"], choice["adapter"]) for choice in report["ranking"]}
    assert pairs == {(first, second) for first in optimizers.split(",") for second in adapters.split(",")}
    assert_comparable(report)
    assert (output / "report.html").read_text().count("<figure>") == 3
    assert len((output / "report.csv").read_text().splitlines()) == 1 + len(pairs)


def test_what_a_rule_refuses_is_a_refused_cell_with_its_sentence(
    tiny_llama: Path, instructions: Path, tmp_path: Path
) -> None:
    path = write_file(tmp_path, tiny_llama, instructions)
    words = Asked(
        config=str(path),
        overrides=["train.gradient_accumulation_steps=2", "adapter.r=3"],
        optimizers=["adamw", "lomo"],
        adapters=["none", "lora", "ia3"],
        rates={},
        seeds=[],
        output=tmp_path / "compared",
    )
    grid = Grid.of(words)
    assert [cell.pair for cell in grid.cells] == [Pair("adamw", "none"), Pair("adamw", "lora")]
    reasons = {refusal.pair: refusal.reason for refusal in grid.refused}
    assert "none has the whole gradient" in reasons[Pair("lomo", "none")]
    assert "none has the whole gradient" in reasons[Pair("lomo", "lora")]
    assert "adapter.r" in reasons[Pair("adamw", "ia3")]
