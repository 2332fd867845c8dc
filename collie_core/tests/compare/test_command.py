"""`collie compare` as a command, with runs that are functions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from compared import FILE, rows_of, write_run

from collie_core import launch
from collie_core.cli import _quiet, main
from collie_core.cli import compare as command
from collie_core.compare import comparison
from collie_core.errors import RunError


def train(config: str, processes: int | None, overrides: Sequence[str]) -> None:
    (place,) = (text for text in overrides if text.startswith("train.output_dir="))
    if "train.seed=3" in overrides:
        raise RunError("the third one fails")
    run = Path(place.partition("=")[2].strip('"'))
    write_run(run, rows_of([2.0, 1.0], [2.0, 1.0]))
    (run / "processes").write_text(f"{processes}")


@pytest.fixture(autouse=True)
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "preload", lambda grid: None)
    monkeypatch.setattr(comparison.memory, "predict", lambda *_: 2**20)
    monkeypatch.setattr(comparison.memory, "measure", lambda *_: 2**21)
    monkeypatch.setattr(_quiet, "quiet_imports", lambda: None)
    monkeypatch.setattr(command, "_train", train)


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    path = tmp_path / "run.yaml"
    path.write_text(FILE)
    return ["compare", str(path), "--optimizers", "adamw,sgd", "--output", str(tmp_path / "compared")]


def test_it_prints_a_ranking_and_writes_the_reports(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--seeds", "1,2", "--nproc", "2", "train.max_steps=2"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "1/6  adamw: memory ... done"
    assert said[7].split() == [
        "learning",
        "rate",
        "evaluation",
        "loss",
        "training",
        "loss",
        "tokens/s",
        "peak",
        "predicted",
        "measured",
    ]
    assert said[8].split()[:6] == ["1", "adamw", "0.0003", "1.000", "±", "0.000"]
    assert said[11:] == ["4 done", f"report    {words[-1]}/report.html"]
    folder = Path(words[-1])
    assert sorted(path.name for path in folder.glob("report.*")) == ["report.csv", "report.html", "report.json"]
    assert (folder / "cells/sgd-none-lr0.01-seed2/processes").read_text() == "2"


def test_a_failure_is_its_exit_code(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--seeds", "1,3"]) == 1
    said = capsys.readouterr().out
    assert "2 done, 2 failed" in said
    assert "sgd, lr 0.01, seed 3: failed: the third one fails" in said
    assert main([*words, "--seeds", "1"]) == 0
    assert main([*words, "--seeds", "3"]) == 1


def test_refused_ones_are_none_unless_all_are(words: list[str]) -> None:
    assert main([*words, "optimizer.betas=[0.1, 0.2]"]) == 0
    assert main([*words, "--output", f"{words[-1]}-2", "optimizer.betas=1"]) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--cell-timeout", "0"], "--cell-timeout 0: must be above 0"),
        (["--cell-timeout", "nan"], "--cell-timeout nan: must be above 0"),
        (["--nproc", "0"], "--nproc 0: must be at least 1"),
        (["--output", "/dev/null/x"], "/dev/null/x cannot be written"),
        (["--seeds", "x"], "--seeds x: 'x' must be a whole number"),
        (["--adapters", ""], "--adapters : '' is no name"),
        (["optimizer=sgd"], "say it by --optimizers"),
    ],
)
def test_mistakes_are_said_in_a_sentence(
    words: list[str], more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, *more]) == 1
    assert message in capsys.readouterr().err
    assert not Path(words[-1]).exists()


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_a_launcher_is_refused(
    words: list[str], launcher: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0") if launcher == "torchrun" else monkeypatch.setattr(launch, "launched", lambda: True)
    assert main(words) == 1
    assert "leave torchrun and srun out" in capsys.readouterr().err
