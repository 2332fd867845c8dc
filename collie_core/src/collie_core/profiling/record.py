"""A few steps of a run, taken by the run's own loop, with a clock that is told of every phase."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.profiler import ProfilerActivity, profile

from collie_core.data.loader import pack
from collie_core.hookspecs import FusedOptimizer
from collie_core.loop import Trainer
from collie_core.plugins import hookimpl
from collie_core.profiling.align import ahead_of_here
from collie_core.profiling.calls import Calls
from collie_core.profiling.clock import Clock, Phase, Timeline
from collie_core.profiling.kernels import busy_share
from collie_core.rehearsal import Rehearsal

if TYPE_CHECKING:
    from collie_core.config.run import RunConfig
    from collie_core.data.loader import Batch, Loader, StepBatch
    from collie_core.hookspecs import Run

WARM_UP = 3  # steps: memory is found, kernels are chosen, DeepSpeed learns the order of layers
TRACED = 1  # steps under torch's profiler, which slows them, so that they are not among the measured ones
TRACE = "trace-rank-{rank}.json.gz"


@dataclass
class Recording:
    """What one rank has found."""

    rank: int
    stage: int
    timeline: Timeline
    tokens: int = 0  # of the measured steps, without padding
    computed_tokens: int = 0  # with it
    packed_tokens: int = 0  # with what would be left of it if samples were packed
    micro_batches: int = 0  # per step, of the last one
    busy: float = 1.0  # the share of the traced forward and backward in which an operation ran
    trace: str = ""  # a file


@dataclass
class _Count:
    tokens: int = 0
    computed: int = 0
    packed: int = 0
    micro_batches: int = 0


def overrides(steps: int, folder: Path) -> list[str]:
    """What makes of a run its first steps: nothing is evaluated, served, saved or tracked."""
    return [
        f"train.max_steps={WARM_UP + steps + TRACED}",
        "train.num_train_epochs=null",
        f"train.output_dir={json.dumps(str(folder / 'run'))}",
        "train.overwrite_output_dir=true",
        "train.on_nan=stop",
        "data.eval=[]",
        "evaluation={}",
        "checkpoint={}",
        "server=null",
        "report_to=[]",
    ]


def record(config: RunConfig, steps: int, folder: Path) -> list[Recording]:
    """Take the steps; returns what every rank has found, on every rank. Collective.

    Args:
        config: with `overrides`.
        steps: how many are measured.
        folder: where each rank puts its trace; it is there.

    Raises:
        CollieError: the run cannot be.
    """
    recorder = _Recorder(steps, folder)
    trainer = Rehearsal(config, callbacks=[recorder], observers=())
    recorder.watch(trainer)
    with recorder.calls.watched() if trainer.topology.world_size > 1 else nullcontext():
        trainer.train()
    own = recorder.recording()
    own.timeline = own.timeline.shifted(ahead_of_here(trainer.topology))
    found: list[Recording] = trainer.topology.gather_objects(own)
    return found


def packed_tokens(batch: StepBatch, rows_per_micro_batch: int, max_length: int) -> int:
    """How many tokens this rank's samples of a step take as `data.packing` lays them out, with padding."""
    layouts = (row for micro_batch in batch.micro_batches for row in micro_batch.layout)
    lengths = [length for row in layouts for _, length in row if length]
    rows = [sum(lengths[place] for place in row) for row in pack(lengths, max_length)]
    chunks = (rows[start : start + rows_per_micro_batch] for start in range(0, len(rows), rows_per_micro_batch))
    return sum(len(chunk) * max(chunk) for chunk in chunks)


class _Recorder:
    """The callback that tells the clock what runs. It stands around what belongs to a phase as closely as it can."""

    clock: Clock
    calls: Calls

    def __init__(self, steps: int, folder: Path) -> None:
        self.steps = steps
        self.folder = folder
        self._begun: set[int] = set()  # micro-batches whose forward has run, and whose backward has not
        self._updates = False
        self._done = 0
        self._count = _Count()

    def watch(self, trainer: Trainer) -> None:
        """Before anything of a run is built."""
        self._trainer = trainer
        self.clock = Clock(trainer.topology.device)
        self.calls = Calls(self.clock, trainer.topology)
        parts: Any = trainer.parts
        make: Callable[[int], Loader] = parts.loader
        parts.loader = lambda start=0: self._loaded(make(start))

    @hookimpl(trylast=True)
    def collie_run_start(self, run: Run) -> None:
        """The engine stands."""
        step: Any = self._trainer.parts.step
        around = step.around
        step.around = lambda batch: self._around(batch, around)
        optimizer = getattr(step, "optimizer", None)
        if isinstance(optimizer, FusedOptimizer):
            self._watch_update(optimizer)

    @hookimpl(trylast=True)
    def collie_before_step(self, run: Run, batch: StepBatch) -> None:
        """Count the tokens of measured steps."""
        if WARM_UP <= self._done < WARM_UP + self.steps:
            self._count.tokens += batch.tokens
            self._count.computed += sum(one.input_ids.numel() for one in batch.micro_batches)
            self._count.packed += packed_tokens(batch, self._trainer.parts.micro_batch_size, run.config.data.max_length)
            self._count.micro_batches = len(batch.micro_batches)

    @hookimpl(trylast=True)
    def collie_before_update(self, run: Run) -> None:
        """The update begins."""
        self._updates = True
        self.clock.enter("update")

    @hookimpl(tryfirst=True)
    def collie_after_step(self, run: Run) -> None:
        """The step has ended."""
        if self._updates:
            self.clock.leave()
        self._updates = False
        self._done += 1
        self.clock.step_ends()
        if self._done == WARM_UP:
            self.clock.start()
        if self._done == WARM_UP + self.steps:
            self._timeline = self.clock.stop()
            self._begin_trace()
        if self._done == WARM_UP + self.steps + TRACED:
            self._end_trace()

    def recording(self) -> Recording:
        """What was found, once the run has ended."""
        topology, count = self._trainer.topology, self._count
        return Recording(
            topology.rank,
            topology.pp.rank,
            self._timeline,
            count.tokens,
            count.computed,
            count.packed,
            count.micro_batches,
            self._busy,
            str(self._trace),
        )

    def _loaded(self, loader: Loader) -> Iterator[StepBatch]:
        batches = iter(loader)
        while True:
            with self.clock.phase("data"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    @contextmanager
    def _around(self, batch: Batch, around: Callable[[Batch], AbstractContextManager[Any]]) -> Iterator[None]:
        """A step enters this for the forward of a micro-batch, and then for its backward."""
        phase: Phase = "backward" if id(batch) in self._begun else "forward"
        self._begun ^= {id(batch)}
        with self.clock.phase(phase), around(batch):
            yield

    def _watch_update(self, optimizer: Any) -> None:
        update = optimizer.update

        def timed(*args: Any) -> None:
            with self.clock.phase("update"):
                update(*args)

        optimizer.update = timed

    def _begin_trace(self) -> None:
        cuda = [ProfilerActivity.CUDA] if self._trainer.topology.device.type == "cuda" else []
        self._profiler: Any = profile(activities=[ProfilerActivity.CPU, *cuda])
        self._profiler.__enter__()
        self.clock.annotates = True

    def _end_trace(self) -> None:
        self.clock.annotates = False
        self._profiler.__exit__(None, None, None)
        self._busy = busy_share(self._profiler)
        self._trace = self.folder / TRACE.format(rank=self._trainer.topology.rank)
        self._profiler.export_chrome_trace(str(self._trace))
