"""metrics.jsonl."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fake_runs import make_run, play, row, tell

from collie_core.report.metrics import MetricsFile


def strict_rows(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_one_object_per_logged_step_and_evaluation(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    play([MetricsFile()], run)
    rows = strict_rows(tmp_path / "metrics.jsonl")
    assert [item["step"] for item in rows] == [1, 2, 3, 3]
    assert set(rows[0]) == set(row(run))
    assert rows[3] == {"step": 3, "epoch": 0.0, "eval/loss": 1.25, "eval/perplexity": math.exp(1.25)}


def test_numbers_json_does_not_know_become_null(tmp_path: Path) -> None:
    run, file = make_run(tmp_path), MetricsFile()
    tell([file], "collie_run_start", run=run)
    values = {"step": 1, "a": math.nan, "b": -math.inf, "c": torch.tensor(math.nan), "d": torch.tensor(2.0)}
    tell([file], "collie_metrics", run=run, values=values | {"e": np.float32(0.5), "f": np.int64(3)})
    tell([file], "collie_run_end", run=run, error=None)
    (written,) = strict_rows(tmp_path / "metrics.jsonl")
    assert written == {"step": 1, "a": None, "b": None, "c": None, "d": 2.0, "e": 0.5, "f": 3}


def test_each_row_is_on_disk_at_once(tmp_path: Path) -> None:
    run, file = make_run(tmp_path), MetricsFile()
    tell([file], "collie_run_start", run=run)
    for run.step in (1, 2):
        tell([file], "collie_metrics", run=run, values=row(run))
        assert len(strict_rows(tmp_path / "metrics.jsonl")) == run.step
    tell([file], "collie_run_end", run=run, error=None)


def test_an_evaluation_outside_of_a_run_writes_nothing(tmp_path: Path) -> None:
    tell([MetricsFile()], "collie_evaluated", run=make_run(tmp_path), results={"eval/loss": 1.0}, samples=[])
    assert not list(tmp_path.iterdir())
