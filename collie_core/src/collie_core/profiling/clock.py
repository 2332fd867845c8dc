"""What a rank does from moment to moment.

Phases lie in each other, and the innermost one counts: every moment belongs to exactly one, so that their lengths add
up to the time that has passed. On a CPU moments are read from the clock. On a GPU they are events in the stream that
computes, read at the end: work that the host or another stream does meanwhile, and nobody waits for, has no length.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.profiler import record_function

Phase = Literal["data", "forward", "backward", "communication", "update", "rest"]
NO_CALL = -1
PREFIX = "collie: "  # of phases in a trace of torch's profiler


@dataclass
class Timeline:
    """One rank's moments, in seconds of a clock that all ranks share."""

    marks: list[tuple[float, Phase, int]] = field(default_factory=list)
    """(when, the phase that begins, the number of the call that is waited for or `NO_CALL`); the last one ends."""
    calls: list[tuple[float, tuple[str, ...], str]] = field(default_factory=list)
    """Exchanges with other ranks: (when it was begun, its names, which are the same on all who take part, and axis)."""
    steps: list[float] = field(default_factory=list)  # when each step ended, and at first when the first one began
    wall_s: float = 0.0  # by the clock of the host, from the first to the last of `steps`

    def shifted(self, seconds: float) -> Timeline:
        """The same by a clock that is so much ahead."""
        marks = [(when + seconds, phase, call) for when, phase, call in self.marks]
        calls = [(when + seconds, names, axis) for when, names, axis in self.calls]
        return Timeline(marks, calls, [when + seconds for when in self.steps], self.wall_s)


class Clock:
    """Moments of a rank between `start` and `stop`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._open: list[tuple[Phase, int]] = [("rest", NO_CALL)]
        self._ranges: list[Any] = []  # of torch's profiler
        self._runs = False
        self.annotates = False  # whether phases are also shown to torch's profiler
        self._marks: list[tuple[Any, Phase, int]] = []
        self._calls: list[tuple[Any, tuple[str, ...], str]] = []
        self._steps: list[Any] = []

    def start(self) -> None:
        """Forget everything; the first step begins."""
        self._marks, self._calls, self._steps = [], [], []
        self._synchronize()
        self._base, self._base_s = self._now(), time.perf_counter()
        self._runs = True
        self._mark()
        self.step_ends()
        self._began_s = self._ended_s

    def stop(self) -> Timeline:
        """All moments since `start`; the last step has ended."""
        self._mark()
        self._runs = False
        if self._stream is not None:  # the host is ahead of it
            self._synchronize()
            self._ended_s = time.perf_counter()
        marks = [(self._time(when), phase, call) for when, phase, call in self._marks]
        calls = [(self._time(when), names, axis) for when, names, axis in self._calls]
        steps = [self._time(when) for when in self._steps]
        return Timeline(marks, calls, steps, self._ended_s - self._began_s)

    def step_ends(self) -> None:
        """The next one begins."""
        if self._runs:
            self._steps.append(self._now())
            self._ended_s = time.perf_counter()

    def enter(self, phase: Phase, call: int = NO_CALL) -> None:
        """A phase begins inside the one that runs."""
        self._open.append((phase, call))
        if self.annotates:
            self._ranges.append(record_function(f"{PREFIX}{phase}"))
            self._ranges[-1].__enter__()
        self._mark()

    def leave(self) -> None:
        """The phase that was entered last ends."""
        self._open.pop()
        if self.annotates:
            self._ranges.pop().__exit__(None, None, None)
        self._mark()

    @contextmanager
    def phase(self, phase: Phase, call: int = NO_CALL) -> Iterator[None]:
        """Inside, the phase runs."""
        self.enter(phase, call)
        try:
            yield
        finally:
            self.leave()

    def call(self, names: tuple[str, ...], axis: str) -> int:
        """An exchange with other ranks begins; returns its number."""
        if not self._runs:
            return NO_CALL
        self._calls.append((self._now(), names, axis))
        return len(self._calls) - 1

    def _mark(self) -> None:
        if self._runs:
            self._marks.append((self._now(), *self._open[-1]))

    def _now(self) -> Any:
        if self._stream is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def _time(self, moment: Any) -> float:
        if self._stream is None:
            return float(moment)
        return self._base_s + float(self._base.elapsed_time(moment)) / 1000  # milliseconds

    def _synchronize(self) -> None:
        if self._stream is not None:
            torch.cuda.synchronize(self._device)
