"""What a person sees while a comparison runs."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import pytest
from compared import rows_of, write_run
from rich.console import Console

from collie_core.compare import progress
from collie_core.compare.progress import Lines


def play(lines: Lines, run: Path) -> None:
    with lines:
        lines.begins("adamw: memory", 1, 3, None)
        lines.looks()
        lines.ended("done", "", None)
        lines.begins("adamw, lr 0.1, seed 1", 2, 3, run)
        lines.looks()
        write_run(run, rows_of([2.0, 1.5], [3.0]))
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 3, "lo')
        lines.looks()
        assert threading.active_count() == ALONE
        lines.ended("done", "", run)
        lines.begins("lion", 3, 3, run)
        lines.ended("failed", "it is\nno [bold]run", run)


ALONE = threading.active_count()  # it is forked meanwhile, so there must be no thread


def test_lines_where_there_is_no_terminal(tmp_path: Path) -> None:
    out = io.StringIO()
    play(Lines(Console(file=out, width=200)), tmp_path)
    assert out.getvalue().splitlines() == [
        "1/3  adamw: memory ... done",
        "2/3  adamw, lr 0.1, seed 1 ... done  step 2  loss 1.500  eval/loss 3.000  200 tok/s",
        "3/3  lion ... failed: it is⏎no [bold]run",
    ]


def test_numbers_of_the_run_in_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "REFRESH_S", 0.0)
    out = io.StringIO()
    play(Lines(Console(file=out, width=200, force_terminal=True, color_system=None)), tmp_path)
    said = out.getvalue()
    assert "2/3  adamw, lr 0.1, seed 1  step 2  loss 1.500  eval/loss 3.000  200 tok/s" in said
    assert "2/3  adamw, lr 0.1, seed 1  done  step 2" in said
    assert "3/3  lion  failed: it is⏎no [bold]run" in said
