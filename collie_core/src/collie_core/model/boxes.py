"""Boxes: the part of a tensor between a begin and an end in every dimension."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Box = tuple[tuple[int, int], ...]
"""[begin, end) per dimension."""


@dataclass(frozen=True)
class Piece:
    """A box of the checkpoint tensor `key` that is a box of a model's tensor.

    Both have the same shape, except that `source` may lack a leading dimension in which `target` is 1 long: a matrix of
    its own in the file may be one expert of a stack.
    """

    key: str
    source: Box
    target: Box


def whole(shape: Sequence[int]) -> Box:
    """All of a tensor."""
    return tuple((0, size) for size in shape)


def shape_of(box: Box) -> tuple[int, ...]:
    """The lengths of its sides."""
    return tuple(end - begin for begin, end in box)


def volume(box: Box) -> int:
    """The number of its entries."""
    return math.prod(shape_of(box))


def slices(box: Box) -> tuple[slice, ...]:
    """For indexing."""
    return tuple(slice(begin, end) for begin, end in box)


def common(first: Box, second: Box) -> Box | None:
    """What lies in both; None when nothing does."""
    both = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(first, second, strict=True))
    return None if any(begin >= end for begin, end in both) else both


def moved(box: Box, start: Box, goal: Box) -> Box:
    """Where `box`, inside `start`, lies when `start` is laid onto `goal`, which may lack leading dimensions."""
    skipped = len(box) - len(goal)
    return tuple(
        (begin - origin + there, end - origin + there)
        for (begin, end), (origin, _), (there, _) in zip(box[skipped:], start[skipped:], goal, strict=True)
    )


def replaced(box: Box, dim: int, side: tuple[int, int]) -> Box:
    """The box with another side in one dimension."""
    return (*box[:dim], side, *box[dim + 1 :])
