"""From the moments of all ranks to seconds per step.

An exchange can only take place once the last of those who take part has begun it. Until then a rank that is held up
by it waits; what is left is communication. So a late rank is told from a slow network.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from collie_core.profiling.clock import NO_CALL, Timeline
from collie_core.profiling.record import Recording

PARTS = ("data", "forward", "backward", "communication", "waiting", "update", "rest")


@dataclass(frozen=True)
class RankProfile:
    """One rank, in seconds per step."""

    rank: int
    stage: int
    parts: Mapping[str, float]
    axes: Mapping[str, Mapping[str, float]]  # communication and waiting by axis: tp, pp, dp, or all ranks
    late_s: Mapping[str, float]  # by axis, how long each of the others has waited for this one, on average
    error: float  # how far the parts are from the wall time, as a share of it
    busy: float
    trace: str


@dataclass(frozen=True)
class Profile:
    """All ranks of a run."""

    steps: tuple[float, ...]  # seconds of each, on rank 0
    ranks: tuple[RankProfile, ...]
    tokens: int  # per step over all data-parallel ranks, without padding
    computed_tokens: int  # with it
    packed_tokens: int  # with what would be left of it if samples were packed
    micro_batches: int  # of a rank, per step

    @property
    def step_s(self) -> float:
        """Seconds of a step, on average over steps and ranks."""
        return sum(self.mean.values())

    @property
    def mean(self) -> dict[str, float]:
        """Seconds per step by part, on average over the ranks."""
        return {part: sum(rank.parts[part] for rank in self.ranks) / len(self.ranks) for part in PARTS}

    def most(self, part: str) -> float:
        """Seconds per step on the rank that spends the most."""
        return max(rank.parts[part] for rank in self.ranks)

    def along(self, part: str, axis: str) -> float:
        """Seconds per step of communication or waiting along an axis, on average over the ranks."""
        return sum(rank.axes[part].get(axis, 0.0) for rank in self.ranks) / len(self.ranks)

    def held_up_by(self, axis: str) -> int | None:
        """The rank that the others wait for along an axis; None: they wait for one another in turns."""
        late = sorted(self.ranks, key=lambda rank: rank.late_s.get(axis, 0.0))
        before, last = (rank.late_s.get(axis, 0.0) for rank in (late[-2:] if len(late) > 1 else 2 * late))
        return late[-1].rank if last > 2 * before else None

    @property
    def padding(self) -> float:
        """The share of computed tokens that is padding."""
        return 1 - self.tokens / self.computed_tokens

    @property
    def error(self) -> float:
        """Of the rank whose parts are farthest from its wall time."""
        return max(rank.error for rank in self.ranks)

    @property
    def busy(self) -> float:
        """The share of forward and backward in which operations run, on average."""
        return sum(rank.busy for rank in self.ranks) / len(self.ranks)


def account(recordings: Sequence[Recording], tensor_parallel_size: int) -> Profile:
    """The seconds of every rank.

    Args:
        recordings: of all ranks, in order.
        tensor_parallel_size: how many ranks read the same samples in each stage.
    """
    arrivals = _arrivals([recording.timeline for recording in recordings])
    found = [_Sums() for _ in recordings]
    for recording in recordings:
        _add_up(recording, arrivals, found)
    steps = len(recordings[0].timeline.steps) - 1
    readers = [one for one in recordings if one.stage == 0][::tensor_parallel_size]
    return Profile(
        tuple(end - begin for begin, end in zip(*_neighbours(recordings[0].timeline.steps), strict=True)),
        tuple(_profile_of(recording, sums, steps) for recording, sums in zip(recordings, found, strict=True)),
        round(sum(one.tokens for one in readers) / steps),
        round(sum(one.computed_tokens for one in readers) / steps),
        round(sum(one.packed_tokens for one in readers) / steps),
        recordings[0].micro_batches,
    )


@dataclass
class _Sums:
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    axes: dict[str, dict[str, float]] = field(
        default_factory=lambda: {part: defaultdict(float) for part in ("communication", "waiting")}
    )
    late: dict[str, float] = field(default_factory=lambda: defaultdict(float))


def _arrivals(timelines: Sequence[Timeline]) -> dict[str, tuple[float, int, int]]:
    """For each exchange, when the last rank began it, which one that was, and how many they are."""
    last: dict[str, tuple[float, int, int]] = {}
    for rank, timeline in enumerate(timelines):
        for when, names, _ in timeline.calls:
            for name in names:
                latest, who, count = last.get(name, (when, rank, 0))
                last[name] = (when, rank, count + 1) if when > latest else (latest, who, count + 1)
    return last


def _add_up(recording: Recording, arrivals: Mapping[str, tuple[float, int, int]], found: Sequence[_Sums]) -> None:
    own, timeline = found[recording.rank], recording.timeline
    for begin, end, phase, call in _pieces(timeline):
        if phase != "communication" or call == NO_CALL:
            own.parts[phase] += end - begin
            if phase == "communication":
                own.axes[phase]["all"] += end - begin
            continue
        _, names, axis = timeline.calls[call]
        when, who, count = max((arrivals[name] for name in names), default=(begin, recording.rank, 1))
        waited = 0.0 if who == recording.rank else min(max(when - begin, 0.0), end - begin)
        for part, seconds in (("waiting", waited), ("communication", end - begin - waited)):
            own.parts[part] += seconds
            own.axes[part][axis] += seconds
        if waited:
            found[who].late[axis] += waited / (count - 1)


def _pieces(timeline: Timeline) -> Iterator[tuple[float, float, str, int]]:
    """(begin, end, phase, call) from the first step's beginning to the last one's end."""
    first, last = timeline.steps[0], timeline.steps[-1]
    for (begin, phase, call), (end, *_) in zip(*_neighbours(timeline.marks), strict=True):
        begin, end = max(begin, first), min(end, last)
        if end > begin:
            yield begin, end, phase, call


def _neighbours(values: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    return values[:-1], values[1:]


def _profile_of(recording: Recording, sums: _Sums, steps: int) -> RankProfile:
    def per_step(found: Mapping[str, float]) -> dict[str, float]:
        return {name: seconds / steps for name, seconds in found.items()}

    wall = recording.timeline.wall_s
    return RankProfile(
        recording.rank,
        recording.stage,
        per_step(sums.parts),
        {part: per_step(found) for part, found in sums.axes.items()},
        per_step(sums.late),
        abs(sum(sums.parts.values()) - wall) / wall,
        recording.busy,
        recording.trace,
    )
