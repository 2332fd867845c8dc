"""The trace of a model with many layers, from those of the same model with a few.

Where all layers are alike, a trace with one layer more is the same sequence of operations with some of them repeated
once more, and what is held at an operation, counted from the beginning of the repetition or from its end, grows by the
same number of bytes with each layer. So two traces say what each operation of a deeper model holds, whichever of them
is the one at the peak there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from difflib import SequenceMatcher
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from collie_core.plan.trace import COMPONENTS, Operation, Peak, Section, Where

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Trace(NamedTuple):
    """What was held at every operation, with so many layers."""

    size: int
    sections: Sequence[Section]


def alike(first: Sequence[Section], second: Sequence[Section]) -> bool:
    """Whether two traces go through the same phases."""
    return [one.phase for one in first] == [one.phase for one in second]


def extended(
    first: Trace, second: Trace, size: int, where: Where = "device", *, bounded: bool = False
) -> dict[str, Peak]:
    """The peak of each phase at another size, from two traces that are alike.

    Args:
        first, second: of two sizes.
        size: the other one.
        where: of which memory.
        bounded: whether gradients go through buckets, which two models with a layer more fill to other levels when
            backward ends. Operations there grow as those at its beginning do, at the most.
    """
    peaks: dict[str, Peak] = {}
    for before, after in zip(first.sections, second.sections, strict=True):
        times = (size - first.size) / (second.size - first.size)
        held = _extended(before, after, times, where, bounded=bounded and before.phase == "backward")
        most = held[held.sum(1).argmax()]
        if before.phase not in peaks or most.sum() > peaks[before.phase].total:
            components = dict(zip(COMPONENTS, map(int, most), strict=True))
            peaks[before.phase] = Peak(components, before.phase)
    return peaks


def _extended(before: Section, after: Section, times: float, where: Where, *, bounded: bool) -> NDArray[np.float64]:
    """What is held at operations when there is so many times more of what the second section has more than the first.

    An operation that the second one lacks grows as those around it do.
    """
    pairs = _aligned(*_comparable(before.operations, after.operations))
    low, high = before.held[where], after.held[where]
    growth = high[pairs[:, 1]] - low[pairs[:, 0]]
    if bounded:
        most = growth[0].sum()
        total = growth.sum(1)
        growth = growth * np.where(total > most, most / np.maximum(total, 1), 1)[:, None]
    held = [low[pairs[:, 0]] + times * growth]
    lacking = np.setdiff1d(np.arange(len(before.operations)), pairs[:, 0])
    if len(pairs) and len(lacking):
        near = np.abs(pairs[:, 0] - lacking[:, None]).argmin(1)
        held.append(low[lacking] + times * growth[near])
    return np.concatenate(held)


def _comparable(one: Sequence[Operation], other: Sequence[Operation]) -> tuple[list[Operation], list[Operation]]:
    """Both, without the shapes that only one of them has: those depend on the number of layers."""
    known = frozenset(chain(*(shapes for _, shapes in one))) & frozenset(chain(*(shapes for _, shapes in other)))
    first, second = ([(name, shapes & known) for name, shapes in each] for each in (one, other))
    return first, second


def _aligned(short: Sequence[Operation], long: Sequence[Operation]) -> NDArray[np.int64]:
    """Operations that stand for each other, as pairs of numbers.

    Each stretch that both have in common is taken as far as it goes to both sides, so of a repetition its first turns
    are paired with the first ones, and its last turns with the last.
    """
    stretches = sorted(set(_stretches(short, long)))
    return np.concatenate([np.arange(length)[:, None] + (own, other) for own, other, length in stretches])


def _stretches(short: Sequence[Operation], long: Sequence[Operation]) -> Iterator[tuple[int, int, int]]:
    """Begin in each sequence, and length."""
    prefix = _common(zip(short, long, strict=False))
    suffix = _common(zip(reversed(short), reversed(long), strict=False))
    yield 0, 0, prefix
    yield len(short) - suffix, len(long) - suffix, suffix
    begin, end = prefix, len(short) - suffix
    if begin >= end:
        return
    matcher = SequenceMatcher(None, short[begin:end], long[prefix : len(long) - suffix], autojunk=False)
    for own, other, length in matcher.get_matching_blocks():
        if length:
            own, other = own + begin, other + prefix
            back = _common(zip(reversed(short[:own]), reversed(long[:other]), strict=False))
            on = _common(zip(short[own:], long[other:], strict=False))
            yield own - back, other - back, back + on


def _common(pairs: Iterable[tuple[Operation, Operation]]) -> int:
    """How many pairs are equal before the first that is not."""
    number = 0
    for one, other in pairs:
        if one != other:
            break
        number += 1
    return number
