"""Modules that hold a share of themselves on each tensor-parallel rank.

A module turns into one in place, as a subclass of the class that it has: it stays an `nn.Linear` or `nn.Embedding` for
adapters, initialisation and everything else that asks, and its parameters keep their names.

Shapes: B rows, L positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from collie_core.model.collectives import Shares, copy_to, gather_from, scatter_summed, split_to, sum_from

if TYPE_CHECKING:
    from collie_core.model.blocks import Block
    from collie_core.model.partition import Rule
    from collie_core.topology import Axis


@dataclass(frozen=True)
class Shard:
    """What a module holds of its whole; stands on it as `collie_shard`. Copies of the module share it."""

    axis: Axis
    rules: Mapping[str, Rule]  # by parameter, of those that are cut
    partial: Mapping[str, int]  # parameter -> how many neighbouring ranks each have only a part of its gradient

    def __deepcopy__(self, memo: dict[int, Any]) -> Shard:
        return self


def shard_of(module: nn.Module) -> Shard | None:
    """What a module holds of its whole; None when it holds all."""
    return cast("Shard | None", vars(module).get("collie_shard"))


class ColumnParallel(nn.Module):
    """A linear module that computes a share of its outputs."""

    collie_shard: Shard
    shares: Shares  # of the outputs
    gathers: bool  # whether every rank gets all outputs
    block: Block | None  # that its input comes from

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs of this rank], or all outputs."""
        if self.block is None or not self.block.sums_inputs:
            hidden = copy_to(hidden, self.shares.axis)
        output: Tensor = super().forward(hidden)
        return gather_from(output, self.shares, -1) if self.gathers else output


class Head(ColumnParallel):
    """The output head: `gathers` is off inside `sharded_logits`."""


class RowParallel(nn.Module):
    """A linear module that computes the part of all its outputs that a share of its inputs gives."""

    collie_shard: Shard
    shares: Shares  # of the inputs
    splits: bool  # whether it is given all inputs
    transposed: bool  # whether its weight is [inputs, outputs]
    block: Block | None  # whose output it makes
    weight: Tensor
    bias: Tensor | None

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., inputs of this rank], or all inputs -> [..., outputs]; the bias is added once, to the sum."""
        if self.splits:
            hidden = split_to(hidden, self.shares, -1)
        output = hidden @ self.weight if self.transposed else F.linear(hidden, self.weight)
        positions = self.block.positions if self.block is not None and self.block.sums_inputs else None
        if positions is not None:
            output = scatter_summed(output, positions.shares, 1)
        else:
            output = sum_from(output, self.shares.axis)
        return output if self.bias is None else output + self.bias.to(output.dtype)


class VocabularyParallel(nn.Module):
    """An embedding that holds a share of the vocabulary."""

    collie_shard: Shard
    shares: Shares  # of the vocabulary

    def forward(self, input_ids: Tensor) -> Tensor:
        """[...] int64 -> [..., H]."""
        ((begin, end),) = self.shares.mine
        local = input_ids - begin
        foreign = (local < 0) | (local >= end - begin)
        output: Tensor = super().forward(local.masked_fill(foreign, 0))
        return sum_from(output.masked_fill(foreign[..., None], 0.0), self.shares.axis)


class ExpertsParallel(nn.Module):
    """Experts of which every rank holds a share of each one's inner dimension."""

    collie_shard: Shard

    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        """The outputs of all experts, for hidden states and routing weights that are the same on every rank."""
        options = {name: self._share(value) for name, value in options.items()}
        output: Tensor = super().forward(*(self._share(value) for value in inputs), **options)
        return sum_from(output, self.collie_shard.axis)

    def _share(self, value: Any) -> Any:
        is_float = isinstance(value, Tensor) and torch.is_floating_point(value)
        return copy_to(value, self.collie_shard.axis) if is_float else value


def become(module: nn.Module, role: type[nn.Module]) -> None:
    """Give a module a role above the class that it has."""
    module.__class__ = _parallel_class(cast(Any, role), cast(Any, type(module)))


@functools.cache
def _parallel_class(role: Any, stock: Any) -> Any:
    return type(f"{role.__name__}{stock.__name__}", (role, stock), {})
