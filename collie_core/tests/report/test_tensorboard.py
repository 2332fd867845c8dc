"""TensorBoard events."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from fake_runs import make_run, play, row, tell

from collie_core.errors import RunError
from collie_core.report.tensorboard import TensorBoardReporter


def test_scalars_can_be_read_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    play([TensorBoardReporter()], make_run(tmp_path))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (1, pytest.approx(4.0)),
        (2, pytest.approx(2.0)),
        (3, pytest.approx(4 / 3)),
    ]
    assert [event.step for event in events.Scalars("eval/perplexity")] == [3]
    assert "train/step" not in events.Tags()["scalars"]


def test_missing_numbers_are_left_out(tmp_path: Path) -> None:
    run, reporter = make_run(tmp_path), TensorBoardReporter()
    tell([reporter], "collie_run_start", run=run)
    run.step = 1
    tell([reporter], "collie_metrics", run=run, values=row(run, grad_norm=None))
    tell([reporter], "collie_run_end", run=run, error=None)


def test_a_missing_package_is_an_error_when_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(RunError, match=r"pip install 'collie-core\[tensorboard\]'"):
        TensorBoardReporter()
