"""Cells in processes of their own: whatever one does, the others run, and what stands is not done again."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from compared import asked, rows_of, write_run

from collie_core.compare import comparison
from collie_core.compare.comparison import Comparison, result_of
from collie_core.compare.folder import Folder, read
from collie_core.compare.grid import Grid
from collie_core.errors import ConfigError, Problem, RunError
from collie_core.plan.children import each_in_child

SEEDS = [1, 2, 3]
BROKEN = 2  # the seed of the run that does something else


class Told:
    """Progress that is kept."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.look: Callable[[], None] = lambda: None

    def begins(self, what: str, number: int, count: int, run: Path | None) -> None:
        self.lines.append(f"{number}/{count} {what}")

    def looks(self) -> None:
        self.look()

    def ended(self, status: str, reason: str, run: Path | None) -> None:
        self.lines[-1] += f": {status}"


def place(overrides: Sequence[str]) -> Path:
    (found,) = (text.partition("=")[2].strip('"') for text in overrides if text.startswith("train.output_dir="))
    return Path(found)


def ordinary(overrides: Sequence[str]) -> None:
    run = place(overrides)
    print("hello from", run.name)
    write_run(run, rows_of([2.0, 1.0]))
    (run / "begun").write_text("\n".join(overrides))


def but(broken: Callable[[], object]) -> comparison.Train:
    """A run, one seed of which does something else."""

    def train(overrides: Sequence[str]) -> None:
        broken() if f"train.seed={BROKEN}" in overrides else ordinary(overrides)

    return train


@pytest.fixture(autouse=True)
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """No imports, and memory is known."""
    monkeypatch.setattr(comparison, "preload", lambda grid: None)
    monkeypatch.setattr(comparison.memory, "predict", lambda *_: 10)
    monkeypatch.setattr(comparison.memory, "measure", lambda *_: 11)


def compare(folder: Path, train: comparison.Train, **options: Any) -> tuple[Comparison, Told, bool]:
    told = options.pop("progress", Told())
    got: list[signal.Signals] = options.pop("got", [])
    words = asked(folder, options.pop("overrides", []), optimizers=["adamw"], seeds=options.pop("seeds", SEEDS))
    grid, own = Grid.of(words), Folder(words.output)
    with own.taken(grid):
        made = Comparison(words.config, grid, own, None, train, progress=told, written=lambda: None, **options)
        return made, told, made.run(got)


def statuses(made: Comparison) -> list[str]:
    return [str(result_of(made.folder, cell)["status"]) for cell in made.grid.cells]


def refuse() -> None:
    raise ConfigError([Problem("model", "is no model")])


def fail() -> None:
    raise RunError("the loss is no number")


def crash() -> None:
    raise ZeroDivisionError("by zero")


@pytest.mark.parametrize(
    ("broken", "status", "reason"),
    [
        (refuse, "refused", "is no model"),
        (fail, "failed", "the loss is no number"),
        (crash, "failed", "ZeroDivisionError: by zero"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "failed", "SIGKILL; the system may have run out of memory"),
        (lambda: os._exit(3), "failed", "exit code 3 and gave no reason"),
        (lambda: time.sleep(60), "failed", "longer than --cell-timeout 0.5 s"),
    ],
)
def test_a_cell_that_fails_stops_no_other(
    tmp_path: Path, broken: Callable[[], object], status: str, reason: str
) -> None:
    made, told, finished = compare(tmp_path, but(broken), limit_s=0.5)
    assert finished
    assert statuses(made) == ["done", status, "done"]
    assert reason in result_of(made.folder, made.grid.cells[1])["reason"]
    assert read(made.folder.memory(made.grid.pairs[0])) == {"predicted_peak_bytes": 10, "measured_peak_bytes": 11}
    assert told.lines == [
        "1/4 adamw: memory: done",
        "2/4 adamw, lr 0.0003, seed 1: done",
        f"3/4 adamw, lr 0.0003, seed 2: {status}",
        "4/4 adamw, lr 0.0003, seed 3: done",
    ]
    assert "hello from adamw" in made.folder.log(made.grid.cells[0]).read_text()


def test_what_stands_is_not_done_again(tmp_path: Path) -> None:
    compare(tmp_path, but(fail))
    made, told, _ = compare(tmp_path, but(crash))
    assert told.lines == []
    made, told, _ = compare(tmp_path, ordinary, retry=True)
    assert told.lines == ["1/1 adamw, lr 0.0003, seed 2: done"]
    made, told, _ = compare(tmp_path, ordinary, seeds=[1, 2, 3, 4])
    assert told.lines == ["1/1 adamw, lr 0.0003, seed 4: done"]
    assert statuses(made) == ["done"] * 4


def test_a_run_that_somebody_has_deleted_is_made_again(tmp_path: Path) -> None:
    made, _, _ = compare(tmp_path, ordinary)
    shutil.rmtree(made.folder.run(made.grid.cells[1]))
    assert statuses(made) == ["done", "missing", "done"]
    _, told, _ = compare(tmp_path, ordinary)
    assert told.lines == ["1/1 adamw, lr 0.0003, seed 2: done"]


def test_a_log_that_cannot_be_opened_is_the_reason(tmp_path: Path) -> None:
    words = asked(tmp_path, optimizers=["adamw"], seeds=SEEDS)
    Folder(words.output).log(Grid.of(words).cells[1]).mkdir(parents=True)
    made, _, finished = compare(tmp_path, ordinary)
    assert finished
    assert statuses(made) == ["done", "failed", "done"]
    assert "IsADirectoryError" in result_of(made.folder, made.grid.cells[1])["reason"]


def test_a_cell_goes_on_from_its_checkpoint_and_begins_again_without_one(tmp_path: Path) -> None:
    words = asked(tmp_path, optimizers=["adamw"], seeds=SEEDS)
    first, second, _ = Grid.of(words).cells
    (Folder(words.output).run(second) / "checkpoints" / "step-00000001").mkdir(parents=True)
    (Folder(words.output).run(first) / "checkpoints").mkdir(parents=True)
    made, _, _ = compare(tmp_path, ordinary)
    begun = [(made.folder.run(cell) / "begun").read_text().splitlines() for cell in made.grid.cells]
    assert all("train.overwrite_output_dir=true" in overrides for overrides in begun)
    resumes = ["checkpoint.resume_from_checkpoint=auto" in overrides for overrides in begun]
    assert resumes == [False, True, False]


def test_a_signal_is_passed_on_and_the_cell_is_missing_then(tmp_path: Path) -> None:
    told, got = Told(), []
    told.look = lambda: got.append(signal.SIGTERM) if "seed 2" in told.lines[-1] and not got else None
    left = tmp_path / "left"

    def leave() -> None:
        def hear(*_: object) -> None:
            left.write_text("in order")
            os._exit(0)

        signal.signal(signal.SIGTERM, hear)
        time.sleep(60)

    made, told, finished = compare(
        tmp_path, but(leave), progress=told, got=got, overrides=["checkpoint.save_steps=1", "parallel.timeout_s=20"]
    )
    assert not finished
    assert told.lines[-1] == "3/4 adamw, lr 0.0003, seed 2: left"
    assert statuses(made) == ["done", "missing", "missing"]
    assert left.read_text() == "in order"


def test_a_run_that_left_by_itself_is_missing(tmp_path: Path) -> None:
    made, _, finished = compare(tmp_path, but(lambda: None))  # a scheduler's signal went to the run alone
    assert not finished
    assert statuses(made) == ["done", "missing", "missing"]


def test_memory_is_measured_at_the_lowest_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked_for: list[str] = []

    def call(self: Comparison, function: Any, arguments: Any, log: Path, got: Any) -> Any:
        asked_for.extend(text for text in arguments[1] if text.startswith("optimizer.lr="))
        return comparison.Ending("done", 1)

    monkeypatch.setattr(Comparison, "_call", call)
    words = asked(tmp_path, optimizers=["adamw"], rates={"": [1e30, 1e-3]})
    grid, own = Grid.of(words), Folder(words.output)
    with own.taken(grid):
        made = Comparison(words.config, grid, own, None, ordinary, progress=Told(), written=lambda: None)
        made._memory(grid.pairs[0], [])
    assert asked_for == ["optimizer.lr=0.001"] * 2


def test_memory_that_cannot_be_found_has_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison.memory, "predict", lambda *_: fail())
    made, told, _ = compare(tmp_path, ordinary)
    found = read(made.folder.memory(made.grid.pairs[0]))
    assert found == {
        "predicted_peak_bytes": None,
        "predicted_reason": "the loss is no number",
        "measured_peak_bytes": 11,
    }
    assert told.lines[0] == "1/4 adamw: memory: failed"
    assert statuses(made) == ["done"] * 3
    monkeypatch.setattr(comparison.memory, "predict", lambda *_: 12)
    made, told, _ = compare(tmp_path, ordinary, retry=True)
    assert told.lines == ["1/1 adamw: memory: done"]
    assert read(made.folder.memory(made.grid.pairs[0])) == {"predicted_peak_bytes": 12, "measured_peak_bytes": 11}


def test_a_comparison_that_is_killed_takes_its_cell_along(tmp_path: Path) -> None:
    words = asked(tmp_path, optimizers=["adamw"], seeds=SEEDS)
    pid = tmp_path / "pid"

    def linger() -> None:
        pid.write_text(str(os.getpid()))
        time.sleep(60)

    def die() -> None:
        if pid.exists() and pid.read_text():
            os.kill(os.getpid(), signal.SIGKILL)

    def compare_and_die() -> None:
        told = Told()
        told.look = die
        compare(tmp_path, but(linger), progress=told)

    with pytest.raises(RunError, match="exit code -9"):
        each_in_child(compare_and_die, [()])
    cell = int(pid.read_text())
    until = time.monotonic() + 10
    while time.monotonic() < until and (Path(f"/proc/{cell}").exists() and " Z " not in _stat(cell)):
        time.sleep(0.05)
    assert not Path(f"/proc/{cell}").exists() or " Z " in _stat(cell)
    _, told, finished = compare(tmp_path, ordinary)
    assert finished
    assert told.lines == ["1/2 adamw, lr 0.0003, seed 2: done", "2/2 adamw, lr 0.0003, seed 3: done"]
    assert not list(words.output.rglob("*.new"))


def _stat(process: int) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return " Z "
