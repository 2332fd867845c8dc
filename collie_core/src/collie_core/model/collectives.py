"""Collectives of tensor parallelism with their gradients.

They work out of place (autograd hands one gradient tensor to several branches), for tensors of any layout, with parts
of different sizes, and do nothing on an axis of one rank. In the words of Megatron-LM (arXiv 1909.08053, 2205.05198):
`copy_to` is f, `sum_from` is g, `gather_summed` and `scatter_summed` are g and g-bar of sequence parallelism.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from collie_core.model.partition import Interval, Rule
from collie_core.topology import Axis


@dataclass(frozen=True)
class Shares:
    """Which entries of one dimension each rank of an axis holds. Copies of a module share it, for its group's sake."""

    axis: Axis
    intervals: tuple[tuple[Interval, ...], ...]  # by rank

    @classmethod
    def by_rule(cls, rule: Rule, axis: Axis) -> Shares:
        """The shares that a rule of the plan gives."""
        return cls(axis, tuple(tuple(rule.intervals(axis.size, rank)) for rank in range(axis.size)))

    @classmethod
    def even(cls, length: int, axis: Axis) -> Shares:
        """Contiguous shares of as equal a length as possible, the longer ones first."""
        bounds = [rank * (length // axis.size) + min(rank, length % axis.size) for rank in range(axis.size + 1)]
        return cls(axis, tuple(((begin, end),) for begin, end in itertools.pairwise(bounds)))

    def __deepcopy__(self, memo: dict[int, Any]) -> Shares:
        return self

    @property
    def whole(self) -> int:
        """The length of the whole dimension."""
        return max((end for intervals in self.intervals for _, end in intervals), default=0)

    @property
    def mine(self) -> tuple[Interval, ...]:
        """What this rank holds."""
        return self.intervals[self.axis.rank]

    def size(self, rank: int | None = None) -> int:
        """How many entries a rank holds; this one unless said."""
        intervals = self.mine if rank is None else self.intervals[rank]
        return sum(end - begin for begin, end in intervals)

    @property
    def longest(self) -> int:
        """How many entries the rank with the most holds."""
        return max(self.size(rank) for rank in range(self.axis.size))

    def take(self, whole: Tensor, dim: int, rank: int | None = None) -> Tensor:
        """A rank's part of the whole tensor; this one's unless said. Possibly a view."""
        intervals = self.mine if rank is None else self.intervals[rank]
        parts = [whole.narrow(dim, begin, end - begin) for begin, end in intervals]
        if not parts:
            return whole.narrow(dim, 0, 0)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def join(self, parts: Iterable[Tensor], dim: int) -> Tensor:
        """The whole tensor of the parts of all ranks, which may be longer than what the ranks hold."""
        pieces: dict[int, Tensor] = {}
        for intervals, part in zip(self.intervals, parts, strict=True):
            offset = 0
            for begin, end in intervals:
                if end > begin:
                    pieces[begin] = part.narrow(dim, offset, end - begin)
                offset += end - begin
        return torch.cat([pieces[begin] for begin in sorted(pieces)], dim)


def copy_to(tensor: Tensor, axis: Axis) -> Tensor:
    """The same tensor, for ranks that each compute a part from it: gradients are summed over the axis."""
    return tensor if axis.size == 1 else _apply(_CopyTo, tensor, axis)


def sum_from(tensor: Tensor, axis: Axis) -> Tensor:
    """The sum over the axis, for ranks that all go on with it: gradients pass."""
    return tensor if axis.size == 1 else _apply(_SumFrom, tensor, axis)


def gather_from(tensor: Tensor, shares: Shares, dim: int) -> Tensor:
    """The whole tensor, for ranks that all go on with it: the gradient is this rank's part."""
    return tensor if shares.axis.size == 1 else _apply(_GatherFrom, tensor, shares, dim)


def split_to(tensor: Tensor, shares: Shares, dim: int) -> Tensor:
    """This rank's part of a tensor that all ranks hold: gradients are gathered."""
    return tensor if shares.axis.size == 1 else _apply(_SplitTo, tensor, shares, dim)


def gather_summed(tensor: Tensor, shares: Shares, dim: int) -> Tensor:
    """The whole tensor, for ranks that each compute a part from it: gradients are summed, and each keeps its part."""
    return tensor if shares.axis.size == 1 else _apply(_GatherSummed, tensor, shares, dim)


def scatter_summed(tensor: Tensor, shares: Shares, dim: int) -> Tensor:
    """This rank's part of the sum over the axis: gradients are gathered."""
    return tensor if shares.axis.size == 1 else _apply(_ScatterSummed, tensor, shares, dim)


def total(tensor: Tensor, axis: Axis) -> Tensor:
    """The sum over the axis in a new tensor; without a gradient."""
    result = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, group=axis.group)
    return result


def gathered(tensor: Tensor, axis: Axis) -> tuple[Tensor, ...]:
    """The tensors of all ranks, which have one shape; without a gradient."""
    tensor = tensor.contiguous()
    result = tensor.new_empty(axis.size * tensor.numel())
    _all_gather(result, tensor.view(-1), group=axis.group)
    return result.view(axis.size, *tensor.shape).unbind(0)


def _apply(function: type[Function], *inputs: Any) -> Tensor:
    return cast(Tensor, function.apply(*inputs))


# torch 2.13 renamed both.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _gather(tensor: Tensor, shares: Shares, dim: int) -> Tensor:
    return shares.join(gathered(padded(tensor, shares.longest, dim), shares.axis), dim)


def _scatter(tensor: Tensor, shares: Shares, dim: int) -> Tensor:
    axis = shares.axis
    parts = torch.stack([padded(shares.take(tensor, dim, rank), shares.longest, dim) for rank in range(axis.size)])
    result = torch.empty_like(parts[0])
    _reduce_scatter(result.view(-1), parts.view(-1), group=axis.group)
    return result.narrow(dim, 0, shares.size()).contiguous()


def padded(tensor: Tensor, length: int, dim: int) -> Tensor:
    """The tensor with zeros behind it, so that it is as long as the longest part."""
    missing = length - tensor.shape[dim]
    return F.pad(tensor, (0, 0) * (tensor.ndim - 1 - dim % tensor.ndim) + (0, missing)) if missing else tensor


class _CopyTo(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return total(gradient, ctx.axis), None


class _SumFrom(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis) -> Tensor:
        return total(tensor, axis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, None


class _GatherFrom(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, shares: Shares, dim: int) -> Tensor:
        ctx.shares, ctx.dim = shares, dim
        return _gather(tensor, shares, dim)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return ctx.shares.take(gradient, ctx.dim), None, None


class _SplitTo(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, shares: Shares, dim: int) -> Tensor:
        ctx.shares, ctx.dim = shares, dim
        return shares.take(tensor, dim).clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _gather(gradient, ctx.shares, ctx.dim), None, None


class _GatherSummed(_GatherFrom):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _scatter(gradient, ctx.shares, ctx.dim), None, None


class _ScatterSummed(_SplitTo):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, shares: Shares, dim: int) -> Tensor:
        ctx.shares, ctx.dim = shares, dim
        return _scatter(tensor, shares, dim)
