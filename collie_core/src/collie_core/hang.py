"""Who is late: whether the thread that trains makes progress, where it stands, and what all ranks together tell.

A thread of every rank looks once a second where the training thread stands (`Monitor`); the training itself only counts
its steps. When it has stood in one place for `parallel.timeout_s`, inside a run or in a collective, every rank is asked
for its `Status`, and `explain` makes a sentence of them. This file needs the standard library only.
"""

from __future__ import annotations

import faulthandler
import re
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

LOOKS_EVERY_S = 1.0
COLLECTIVES = ("torch/distributed/", "deepspeed/comm/", "deepspeed/utils/comms_logging")
_BACKWARD = "torch/autograd/graph.py"
_LONGEST = 100_000  # characters of all stacks
# What faulthandler writes; see Python/traceback.c, _Py_DumpTracebackThreads.
_THREAD = re.compile(r"(?:Current thread|Thread) 0x([0-9a-f]+)")
_CALL = re.compile(r'  File "(.*)", line (\d+) in (.*)')
_ESCAPED = re.compile(r"\\(x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})")


class Counting(Protocol):
    """A run that counts its steps."""

    step: int


@dataclass
class Progress:
    """The signs of life of the thread that trains, which makes this. It writes them; others read them."""

    thread: int = field(default_factory=threading.get_ident)
    beats: int = 0  # counts whatever happens between two steps
    run: Counting | None = None
    groups: Sequence[Any] = ()  # of torch, that this process is in

    @contextmanager
    def of(self, run: Counting) -> Iterator[None]:
        """Inside, the run trains: now standing still for long is a fault, whatever it waits for."""
        self.run = run
        try:
            yield
        finally:
            self.run = None


@dataclass(frozen=True)
class Status:
    """Where a rank stands."""

    step: int | None  # the last one that it has done; None: it loads, or has finished
    still_s: float  # since it has moved
    waits: bool  # for others, in a collective
    call: str  # what it does, and where
    stack: str
    sequences: dict[str, int]  # collectives that it has begun, by group


class Monitor:
    """A thread that notices when the training thread stands still.

    Args:
        progress: of that thread.
        limit_s: how long it may.
        on_stuck: called in this thread, once for each time it stands still.
    """

    def __init__(self, progress: Progress, limit_s: float, on_stuck: Callable[[], None]) -> None:
        self.progress = progress
        self.limit_s = limit_s
        self.still_s = 0.0
        self._on_stuck = on_stuck
        self._end = threading.Event()
        threading.Thread(target=self._look, name="collie-monitor", daemon=True).start()

    def stop(self) -> None:
        """No longer look."""
        self._end.set()

    def status(self) -> Status:
        """Of this process, now."""
        return status(self.progress, self.still_s)

    def _look(self) -> None:
        every = min(LOOKS_EVERY_S, self.limit_s / 10)
        before, last, told = None, time.monotonic(), False
        while not self._end.wait(every):
            now, where = time.monotonic(), _where(self.progress)
            # A process that was stopped as a whole (Ctrl-Z, a suspended job) has not stood still all the time.
            passed, last = min(now - last, 2 * every), now
            self.still_s = self.still_s + passed if where is not None and where == before else 0.0
            before = where
            if self.still_s < self.limit_s:
                told = False
            elif not told and (self.progress.run is not None or self.status().waits):
                told = True
                self._on_stuck()


def _where(progress: Progress) -> object:
    """Equal for two moments between which the thread has most likely not moved; None when it has ended."""
    places = _dumped().get(progress.thread)
    return None if places is None else (progress.beats, progress.run and progress.run.step, places)


def _dumped() -> dict[int, list[tuple[str, int, str]]]:
    """File, line and function of the innermost calls of every thread, innermost first; by the thread's number.

    Not from `sys._current_frames`: a thread that goes on meanwhile may leave a frame that is looked at here, and one
    that torch.compile has replaced is then freed memory. faulthandler lets no other thread move while it writes.
    """
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        text = file.read().decode("ascii", "replace")
    found: dict[int, list[tuple[str, int, str]]] = {}
    for line in text.splitlines():
        if heading := _THREAD.match(line):
            places = found[int(heading[1], 16)] = []
        elif call := _CALL.match(line):
            places.append((_unescaped(call[1]), int(call[2]), _unescaped(call[3])))
    return found


def _unescaped(text: str) -> str:
    """With the characters that faulthandler writes as \\xhh, \\uhhhh or \\Uhhhhhhhh."""
    return _ESCAPED.sub(lambda found: chr(int(found[1][1:], 16)), text)


def status(progress: Progress, still_s: float) -> Status:
    """Where the training thread of this process stands."""
    stack = _stack(progress.thread)
    sequences = {}
    for group in progress.groups:
        with suppress(RuntimeError):  # not every backend counts
            sequences[group.group_name] = group._get_sequence_number_for_group()
    waits, call = _call(stack)
    step = None if progress.run is None else progress.run.step
    return Status(step, round(still_s, 1), waits, call, "".join(traceback.format_list(stack)), sequences)


def _stack(thread: int) -> list[traceback.FrameSummary]:
    """Of the thread, outermost first; of a backward on a GPU with what torch's own thread does in it."""
    stacks = {
        ident: [traceback.FrameSummary(*place, lookup_line=False) for place in reversed(places)]
        for ident, places in _dumped().items()
    }
    own = stacks.get(thread, [])
    if own and _is_in(own[-1], (_BACKWARD,)):
        ours = {known.ident for known in threading.enumerate()}
        others = [stack for ident, stack in stacks.items() if ident not in ours]
        own += sorted(others, key=len)[-1] if others else []
    return own


def _call(stack: Sequence[traceback.FrameSummary]) -> tuple[bool, str]:
    """Whether the innermost call waits for other ranks, and the call in words."""
    if not stack:
        return False, "nothing: its thread has ended"
    inner = stack[-1]
    if not _is_in(inner, COLLECTIVES):
        return ".wait()" in (inner.line or ""), f"`{inner.line}` at {_place(inner)}"
    first = len(stack) - 1
    while first > 0 and _is_in(stack[first - 1], COLLECTIVES):
        first -= 1
    names = [frame.name for frame in stack[first:] if frame.name != "wrapper"] or [inner.name]
    return True, names[0] + (f", called at {_place(stack[first - 1])}" if first else "")


def _is_in(frame: traceback.FrameSummary, places: Sequence[str]) -> bool:
    path = frame.filename.replace("\\", "/")
    return any(place in path for place in places)


def _place(frame: traceback.FrameSummary) -> str:
    """As short as one finds it again."""
    path = Path(frame.filename)
    roots = [root for root in map(Path, filter(None, sys.path)) if path.is_relative_to(root)]
    short = path.relative_to(max(roots, key=lambda root: len(root.parts))) if roots else path
    return f"{short}:{frame.lineno} ({frame.name})"


# -- all ranks together ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Explanation:
    """Who is late."""

    late: list[int]
    sentence: str
    stacks: str


def explain(
    found: Mapping[int, Status], silent: Sequence[int], *, limit_s: float, name: Callable[[Sequence[int]], str]
) -> Explanation | None:
    """What holds the run up; None where it goes on after all.

    Args:
        found: of the ranks that have answered.
        silent: those that have not.
        limit_s: how long a rank may stand still.
        name: ranks in words, such as "rank 1 of 2 on host".
    """
    if max((status.still_s for status in found.values()), default=0.0) < limit_s:
        return None
    limit = f"parallel.timeout_s={limit_s:g}"
    stacks = "\n".join(_stacks(found, name))[:_LONGEST]
    late = sorted(silent) or _late(found)
    verb = "are" if len(late) > 1 else "is"
    why = "no answer, so stopped or blocked" if silent else _position(found[late[0]])
    others: dict[str, list[int]] = defaultdict(list)
    for rank in sorted(found.keys() - set(late)):
        others[_position(found[rank])].append(rank)
    if not others:
        return Explanation(late, f"{name(late)} {verb} stuck for {limit}: {why}", stacks)
    waiting = "; ".join(
        f"{name(ranks)} {'stand' if len(ranks) > 1 else 'stands'} still {position}"
        for position, ranks in others.items()
    )
    return Explanation(late, f"{name(late)} {verb} late: {why}. {waiting} ({limit})", stacks)


def _position(status: Status) -> str:
    when = "outside of the steps" if status.step is None else f"after step {status.step}"
    return f"{when}, in {status.call}"


def _late(found: Mapping[int, Status]) -> list[int]:
    """Those for whom the others wait. All of them may wait: then some have not come to a collective that others have
    begun, or are at an earlier step, or in another call than most."""
    ranks = sorted(found)
    busy = [rank for rank in ranks if not found[rank].waits]
    behind = _behind(found)
    if not behind:
        steps = [-1 if found[rank].step is None else found[rank].step or 0 for rank in ranks]
        behind = [rank for rank, step in zip(ranks, steps, strict=True) if step < max(steps)]
    if 0 < len(busy) < len(ranks):
        return [rank for rank in busy if rank in behind] or busy
    if behind:
        return behind
    calls = Counter(found[rank].call for rank in ranks)
    rarest = min(calls.values())
    return [rank for rank in ranks if calls[found[rank].call] == rarest]


def _behind(found: Mapping[int, Status]) -> list[int]:
    furthest: dict[str, int] = {}
    for status in found.values():
        for group, number in status.sequences.items():
            furthest[group] = max(number, furthest.get(group, 0))
    return [
        rank
        for rank, status in sorted(found.items())
        if any(number < furthest[group] for group, number in status.sequences.items())
    ]


def _stacks(found: Mapping[int, Status], name: Callable[[Sequence[int]], str]) -> Iterator[str]:
    """Equal ones once."""
    same: dict[str, list[int]] = defaultdict(list)
    for rank, status in sorted(found.items()):
        same[status.stack].append(rank)
    for stack, ranks in same.items():
        yield f"--- {name(ranks)}:\n{stack}"


def as_message(status: Status) -> dict[str, Any]:
    """For the wire."""
    return dict(vars(status))
