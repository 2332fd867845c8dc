"""Which evaluation was best, and when to stop waiting for a better one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_runs import make_run

from collie_core.best import BestModel, improves
from collie_core.config.evaluation import BestConfig
from collie_core.errors import RunError
from collie_core.hookspecs import Run
from collie_core.topology import Topology

NAN, INF = math.nan, math.inf


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = make_run(tmp_path, max_steps=100)
    run.topology = Topology()
    return run


def export(path: Path, add: Callable[[Path], None]) -> None:
    """A model that is one file."""
    path.mkdir(parents=True, exist_ok=True)
    count = path / "exports"
    count.write_text((count.read_text() if count.exists() else "") + "x")
    add(path)


def follow(run: Run, values: list[float], **section: Any) -> list[int]:
    """Tell it these results of eval/x, one a step; returns the steps at which the model was kept."""
    best = BestModel(BestConfig(metric="eval/x", **({"mode": "min"} | section)), run, export)
    kept: list[int] = []
    for run.step, value in enumerate(values, start=1):
        best.evaluated({"eval/x": value, "eval/y": 0.0})
        kept += [run.step] if run.best.get("step") == run.step else []
        if run.stop_reason:
            break
    return kept


def test_the_mode_is_that_of_the_metric_unless_it_is_said(run: Run) -> None:
    run.facts["better"] = {"eval/x": "max"}
    assert follow(run, [1.0, 2.0, 1.5], mode=None) == [1, 2]
    run.best = {}
    assert follow(run, [1.0, 2.0, 0.5], mode="min") == [1, 3]


def test_a_metric_of_which_nobody_knows_what_is_better_needs_a_mode(run: Run) -> None:
    with pytest.raises(
        RunError, match=r"metric=eval/x: .* for eval/loss, eval/perplexity alone; set evaluation\.best\.mode"
    ):
        follow(run, [1.0], mode=None)


@pytest.mark.parametrize(
    ("value", "on", "mode", "by", "expected"),
    [
        (2.0, 3.0, "min", 0.0, True),
        (2.0, 3.0, "max", 0.0, False),
        (3.0, 3.0, "min", 0.0, False),
        (3.0, 3.0, "max", 0.0, False),
        (2.5, 3.0, "min", 0.5, False),
        (2.4, 3.0, "min", 0.5, True),
        (NAN, None, "min", 0.0, False),
        (INF, None, "max", 0.0, False),
        (-INF, 3.0, "min", 0.0, False),
        (5.0, None, "min", 9.0, True),
    ],
)
def test_what_an_improvement_is(value: float, on: float | None, mode: Any, by: float, expected: bool) -> None:
    assert improves(value, on, mode, by) is expected


def test_the_best_is_kept_with_its_number(run: Run) -> None:
    assert follow(run, [3.0, 2.0, 2.0, NAN, 1.5, 4.0]) == [1, 2, 5]
    folder = run.output_dir / "best"
    assert json.loads((folder / "best.json").read_text()) == run.best
    assert run.best == {"step": 5, "epoch": 0.0, "metric": "eval/x", "value": 1.5}
    assert (folder / "exports").read_text() == "xxx"
    assert not run.stop_reason


def test_more_may_be_better(run: Run) -> None:
    assert follow(run, [0.5, 0.75, 0.75, 0.25, 0.9], mode="max") == [1, 2, 5]


def test_numbers_that_are_none_are_never_best(run: Run) -> None:
    assert follow(run, [NAN, INF, NAN], patience=3) == []
    assert not run.output_dir.joinpath("best").exists()
    assert run.stop_reason == "eval/x did not improve for 3 evaluations"


def test_patience_stops_after_evaluations_in_a_row(run: Run) -> None:
    assert follow(run, [3.0, 4.0, 2.0, 2.5, 2.0, 1.0], patience=2) == [1, 3]
    assert run.step == 5
    assert run.stop_reason == "eval/x did not improve for 2 evaluations; the best, 2, was at step 3"


def test_a_small_change_is_the_best_but_no_reason_to_wait(run: Run) -> None:
    """Small improvements add up: each is compared with what patience has counted last, not with the one before."""
    values = [3.0, 2.75, 2.5, 2.25, 2.0, 1.9, 1.8, 1.7]
    assert follow(run, values, patience=2, min_delta=0.25) == [1, 2, 3, 4, 5, 6, 7]
    assert run.step == 7
    assert run.stop_reason == "eval/x did not improve for 2 evaluations; the best, 1.8, was at step 7"


def test_a_run_that_ends_anyway_was_not_stopped(run: Run) -> None:
    run.max_steps = 3
    follow(run, [1.0, 2.0, 3.0], patience=2)
    assert not run.stop_reason


def test_an_earlier_reason_stays(run: Run) -> None:
    best = BestModel(BestConfig(metric="eval/x", mode="min", patience=1), run, export)
    run.request_stop("somebody else")
    best.evaluated({"eval/x": NAN})
    assert run.stop_reason == "somebody else"


def test_an_unknown_result_is_told_with_the_known_ones(run: Run) -> None:
    best = BestModel(BestConfig(metric="eval/z", mode="min"), run, export)
    with pytest.raises(RunError, match=r"evaluation\.best\.metric=eval/z: .* gives eval/x, eval/y$"):
        best.evaluated({"eval/y": 1.0, "eval/x": 2.0})


def test_nothing_is_kept_unless_asked(run: Run) -> None:
    best = BestModel(None, run, export)
    best.evaluated({"eval/x": 1.0})
    assert run.best == {}
    assert not run.output_dir.joinpath("best").exists()


@pytest.mark.parametrize("metric", ["perplexity", "eval/", "train/loss"])
def test_a_result_has_the_name_of_metrics_jsonl(metric: str) -> None:
    with pytest.raises(ValueError, match="must be a result as metrics"):
        BestConfig(metric=metric, mode="min")
