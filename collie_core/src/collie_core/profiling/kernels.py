"""How much of a traced step the device computes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch.autograd import DeviceType  # type: ignore[attr-defined]

from collie_core.profiling.clock import PREFIX

Span = tuple[float, float]  # begin, end
COMPUTING = (f"{PREFIX}forward", f"{PREFIX}backward")
EXCHANGING = f"{PREFIX}communication"


def busy_share(profiler: Any) -> float:
    """The share of a traced step, less communication, in which the device computes.

    On a CPU, of forward and backward, in which any of torch's operations runs. On a GPU, of the time from the first
    kernel to the last. The profiler lengthens what lies between operations most, so that the true share is larger.
    """
    events = profiler.events()
    kernels = [one for one in events if one.device_type == DeviceType.CUDA and not one.name.startswith(PREFIX)]
    work = [_span(one) for one in kernels if "nccl" not in one.name.lower()]
    exchanges = [_span(one) for one in kernels if "nccl" in one.name.lower()]
    phases = [(min(begin for begin, _ in work), max(end for _, end in work))] if work else []
    if not kernels:
        work = [_span(one) for one in events if one.name.startswith("aten::")]
        exchanges = [_span(one) for one in events if one.name == EXCHANGING]
        phases = [_span(one) for one in events if one.name in COMPUTING]
    exchanged = overlap(exchanges, phases)
    whole = overlap(phases, phases) - exchanged
    return (overlap([*work, *exchanges], phases) - exchanged) / whole if whole > 0 else 1.0


def _span(event: Any) -> Span:
    return float(event.time_range.start), float(event.time_range.end)


def overlap(first: Iterable[Span], second: Iterable[Span]) -> float:
    """The length of what both cover."""
    left, right = _union(first), _union(second)
    total, place = 0.0, 0
    for begin, end in left:
        while place < len(right) and right[place][1] <= begin:
            place += 1
        at = place
        while at < len(right) and right[at][0] < end:
            total += min(end, right[at][1]) - max(begin, right[at][0])
            at += 1
    return total


def _union(spans: Iterable[Span]) -> Sequence[Span]:
    joined: list[Span] = []
    for begin, end in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((begin, end))
    return joined
