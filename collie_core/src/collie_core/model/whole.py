"""How the tensor of a rank lies in the whole parameter: for optimizers whose statistics are those of the whole."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor, nn

from collie_core.model.collectives import Shares, gathered, padded

if TYPE_CHECKING:
    from collie_core.model.partition import Rule
    from collie_core.topology import Axis


@dataclass(frozen=True)
class Whole:
    """A parameter of which tensor-parallel ranks hold parts, or the one part there is. Its methods are collective."""

    dim: int | None = None  # the dimension that is cut
    shares: Shares | None = None
    counts: bool = True  # False on ranks that hold a copy of what another rank has

    @classmethod
    def by_rule(cls, rule: Rule, axis: Axis) -> Whole:
        """The whole of a parameter that is cut by a rule of the plan."""
        return cls(rule.dim, Shares.by_rule(rule, axis), counts=axis.rank % rule.copies == 0)

    def __deepcopy__(self, memo: dict[int, object]) -> Whole:
        return self  # process groups cannot be copied

    def shape(self, part: Tensor) -> tuple[int, ...]:
        """The shape of the whole."""
        shape = list(part.shape)
        if self.shares is not None and self.dim is not None:
            shape[self.dim] = self.shares.whole
        return tuple(shape)

    def numel(self, part: Tensor) -> int:
        """The number of entries of the whole."""
        return math.prod(self.shape(part))

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all parts of what was computed from each of them, where every entry counts once."""
        if self.shares is None or self.shares.axis.size == 1:
            return value
        total = value.clone() if self.counts else value.new_zeros(value.shape)
        dist.all_reduce(total, group=self.shares.axis.group)
        return total

    def gather(self, part: Tensor) -> Tensor:
        """The whole tensor of the parts of all ranks."""
        if self.shares is None or self.shares.axis.size == 1:
            return part
        assert self.dim is not None
        parts = gathered(padded(part, self.shares.longest, self.dim), self.shares.axis)
        return self.shares.join(parts, self.dim)

    def take(self, whole: Tensor) -> Tensor:
        """This rank's part of the whole tensor, possibly a view."""
        if self.shares is None or self.dim is None:
            return whole
        return self.shares.take(whole, self.dim)


_ONE = Whole()


def whole_of(parameter: nn.Parameter) -> Whole:
    """What a parameter is a part of."""
    found = getattr(parameter, "collie_whole", None)
    return found if isinstance(found, Whole) else _ONE


def set_whole(parameter: nn.Parameter, rule: Rule, axis: Axis) -> None:
    """Say what a cut parameter is a part of. DeepSpeed reads `tensor_model_parallel`: whether it counts in a norm."""
    whole = Whole.by_rule(rule, axis)
    parameter.collie_whole = whole  # type: ignore[attr-defined]
    parameter.tensor_model_parallel = whole.counts  # type: ignore[attr-defined]
