"""Running the cells of a comparison one after the other, each in a process of its own, and what stands already."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from collie_core.checkpoint import files
from collie_core.compare import memory
from collie_core.compare.child import Child, Ending, Got
from collie_core.compare.folder import Folder, read, write_whole
from collie_core.compare.grid import NONE, Cell, Grid, Pair
from collie_core.errors import CollieError
from collie_core.report.rundir import CHECKPOINTS, METRICS, MODEL

if TYPE_CHECKING:
    from pathlib import Path

PRELOADED = (
    *("transformers", "datasets", "matplotlib.backends.backend_svg", "collie_core.loop", "collie_core.report.charts"),
    *("collie_core.plan.plan", "collie_core.plan.measure"),
)

Train = Callable[[Sequence[str]], None]
"""An ordinary run of the file with these overrides, from beginning to end."""


class Progress(Protocol):
    """What a person sees meanwhile."""

    def begins(self, what: str, number: int, count: int, run: Path | None) -> None:
        """A cell, or the memory of a pair, which has no run directory."""

    def looks(self) -> None:
        """Called now and then while it runs."""

    def ended(self, status: str, reason: str, run: Path | None) -> None:
        """It has."""


@dataclass
class Comparison:
    """Args:
    config: the file.
    grid: what there is to run.
    folder: where to.
    processes: of each run, as on the command line.
    train: how a run is made.
    limit_s: seconds that a cell may take.
    retry: whether what failed is tried again.
    """

    config: str
    grid: Grid
    folder: Folder
    processes: int | None
    train: Train
    limit_s: float | None = None
    retry: bool = False
    progress: Progress = field(kw_only=True)
    written: Callable[[], None] = field(kw_only=True)  # called when something has been found

    def run(self, got: Got) -> bool:
        """Whether all has been found; not when a signal came."""
        todo: list[Cell | Pair] = [cell for cell in self.grid.cells if self.is_missing(cell)]
        pairs = dict.fromkeys(cell.pair for cell in self.grid.cells)
        for pair in filter(self.lacks_memory, pairs):
            first = next((at for at, one in enumerate(todo) if isinstance(one, Cell) and one.pair == pair), len(todo))
            todo.insert(first, pair)
        if todo:
            preload(self.grid)
        for number, one in enumerate(todo, start=1):
            what = f"{one}" if isinstance(one, Cell) else f"{one}: memory"
            run = self.folder.run(one) if isinstance(one, Cell) else None
            self.progress.begins(what, number, len(todo), run)
            ending = self._cell(one, got) if isinstance(one, Cell) else self._memory(one, got)
            if ending is None:
                self.progress.ended("left", "", run)
                return False
            self.progress.ended(ending.status, ending.reason, run)
            self.written()
        return True

    def is_missing(self, cell: Cell) -> bool:
        """Whether a cell has no result, or one that is to be tried again."""
        status = result_of(self.folder, cell)["status"]
        return status == "missing" or (self.retry and status != "done")

    def lacks_memory(self, pair: Pair) -> bool:
        """Whether the memory of a pair is not known, or is to be tried again."""
        found = read(self.folder.memory(pair))
        return found is None or (self.retry and any(name.endswith("_reason") for name in found))

    def _cell(self, cell: Cell, got: Got) -> Ending | None:
        began = time.monotonic()
        log = self.folder.log(cell)
        ending = self._call(self.train, [[*cell.overrides, *self._resumes(cell)]], log, got)
        if ending is None or (ending.status == "done" and not (self.folder.run(cell) / MODEL).exists()):
            return None  # a run that a signal ended leaves no model
        result = {"status": ending.status, "reason": ending.reason, "seconds": round(time.monotonic() - began, 3)}
        write_whole(self.folder.result(cell), result)
        return ending

    def _resumes(self, cell: Cell) -> list[str]:
        """A cell goes on from its checkpoint, if an earlier comparison has left one, and begins again otherwise."""
        begun = files.checkpoints_in(self.folder.run(cell) / CHECKPOINTS)
        return ["train.overwrite_output_dir=true", *(["checkpoint.resume_from_checkpoint=auto"] if begun else [])]

    def _memory(self, pair: Pair, got: Got) -> Ending | None:
        """Predicted and measured; what cannot be found has its reason, and stops nothing."""
        own = (cell for cell in self.grid.cells if cell.pair == pair)
        cell = min(own, key=lambda cell: cell.lr)  # at the highest one two steps may be enough to diverge
        found: dict[str, Any] = {}
        for name, function in (("predicted", memory.predict), ("measured", memory.measure)):
            log = self.folder.memory(pair).with_suffix(".log")
            ending = self._call(function, [self.config, cell.overrides, self.processes], log, got)
            if ending is None:
                return None
            found[f"{name}_peak_bytes"] = ending.value
            found |= {f"{name}_reason": ending.reason} if ending.reason else {}
        write_whole(self.folder.memory(pair), found)
        reasons = [found[name] for name in ("predicted_reason", "measured_reason") if name in found]
        return Ending("failed" if reasons else "done", reason="; ".join(dict.fromkeys(reasons)))

    def _call(self, function: Callable[..., Any], arguments: Sequence[Any], log: Path, got: Got) -> Ending | None:
        child = Child.start(function, arguments, log)
        patience = self.grid.base.parallel.timeout_s if self.grid.base.checkpoint.save_steps else 0.0
        try:
            return child.wait(got, limit_s=self.limit_s, patience=patience, look=self.progress.looks)
        finally:
            if child.process.is_alive():
                child.end()


def preload(grid: Grid) -> None:
    """Import what the cells will need, but touch no device: they are forked from here."""
    for name in PRELOADED:
        import_module(name)
    import torch

    if torch.cuda.device_count():  # what comes next looks at GPUs when it is imported
        return
    import_module("transformers.optimization")  # by way of its Trainer, peft and bitsandbytes
    for pair in dict.fromkeys(cell.pair for cell in grid.cells):
        with suppress(CollieError):  # the cell fails by it, and says it
            grid.base.registry.load("optimizer", pair.optimizer)
            if pair.adapter != NONE:
                grid.base.registry.load("adapter", pair.adapter)


def result_of(folder: Folder, cell: Cell) -> Mapping[str, Any]:
    """The result of a cell; one that has none is missing, and so is one whose run somebody has deleted."""
    found: Mapping[str, Any] | None = read(folder.result(cell))
    if found is None or (found["status"] == "done" and not (folder.run(cell) / METRICS).exists()):
        return {"status": "missing", "reason": "it has not run yet", "seconds": 0.0}
    return found
