"""The memory of a rank, measured: the steps of a prediction, taken really."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from collie_core import starter
from collie_core.plan.rehearse import RehearsedParts, rehearse
from collie_core.plan.trace import MemoryTrace

if TYPE_CHECKING:
    from collie_core.config.run import RunConfig

SETTLE_S = 0.005
BEGIN = "collie: the model stands"


def measure_rank(config: RunConfig) -> int:
    """The most bytes of tensors that this rank held at a time, from when its model stood to the end of two steps.

    On a GPU as torch's allocator counts them. On a CPU one process counts every allocation, those inside of operations
    too. Several ranks follow their tensors instead: there the threads of gloo free some, and a count of
    allocations is not told of that. Collective.
    """
    torch.manual_seed(config.train.seed)
    parts = RehearsedParts(config)
    if parts.device.type == "cuda":
        _take_steps(parts, lambda: torch.cuda.reset_peak_memory_stats(parts.device))
        return int(torch.cuda.max_memory_allocated(parts.device))
    if parts.topology.world_size > 1:
        trace = PatientTrace()
        with trace:
            _take_steps(parts, trace.begin)
        return max(peak.total for peak in trace.peaks().values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        _take_steps(parts, _mark_beginning)
    return _highest(recorded)


def measure_ranks(path: str, overrides: Sequence[str], processes: int) -> list[int]:
    """The same of every rank of a run file, in so many processes of their own."""
    with tempfile.TemporaryDirectory(prefix="collie-plan-") as folder:
        starter.start(processes, ["plan", path, "--record", folder, *overrides])
        return [int((Path(folder) / str(rank)).read_text()) for rank in range(processes)]


class PatientTrace(MemoryTrace):
    """Lets the threads of gloo go on after each collective: they hold its tensors until Python lets them run."""

    _waits = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._waits:
            time.sleep(SETTLE_S)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self._waits = func.namespace == "c10d"
        return result


def _take_steps(parts: RehearsedParts, begin: Callable[[], None]) -> None:
    for moment in rehearse(parts):
        if moment == "model":
            begin()


def _mark_beginning() -> None:
    with record_function(BEGIN):
        pass


def _highest(recorded: Any) -> int:
    """The most bytes that were allocated at a time, after the mark."""
    events = sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    held = most = 0
    begun = False
    for event in events:
        begun = begun or event.name() == BEGIN
        if event.name() == "[memory]":
            held += event.nbytes()
        if begun:
            most = max(most, held)
    return most
