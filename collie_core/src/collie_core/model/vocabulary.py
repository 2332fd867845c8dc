"""The cross-entropy over a vocabulary of which each rank holds a share: nobody holds the logits of all of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from collie_core.model.collectives import total
from collie_core.topology import Axis

IGNORE = -100


@dataclass(frozen=True)
class Vocabulary:
    """This rank's share of the outputs of the head."""

    axis: Axis
    begin: int
    size: int


def cross_entropy(logits: Tensor, targets: Tensor, vocabulary: Vocabulary | None) -> Tensor:
    """The loss of every target, float32 [...], 0 where the target is -100.

    `logits` [..., V] are of the whole vocabulary, or with `vocabulary` this rank's share of it; `targets` [...] int64.
    The softmax is taken in float32. A target outside the vocabulary has an infinite loss on every rank when the
    vocabulary is shared, and is refused by torch otherwise.
    """
    if vocabulary is None:
        losses = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction="none")
        return losses.view(targets.shape)
    return cast(Tensor, _CrossEntropy.apply(logits, targets, vocabulary))  # type: ignore[no-untyped-call]


class _CrossEntropy(Function):
    """Keeps the logits as they came and takes their softmax again in backward: one float32 tensor of their size at a
    time, and none between the passes."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, vocabulary: Vocabulary) -> Tensor:
        axis = vocabulary.axis
        owned = (targets >= vocabulary.begin) & (targets < vocabulary.begin + vocabulary.size)
        local = (targets - vocabulary.begin).masked_fill(~owned, 0)
        of_target = logits.gather(-1, local[..., None]).squeeze(-1).float().masked_fill(~owned, -torch.inf)
        extremes = torch.stack([logits.amax(-1).float(), of_target])
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=axis.group)
        largest, of_target = extremes.unbind()
        normalizer = total(_exponentials(logits, largest).sum(-1), axis).log_().add_(largest)
        ctx.save_for_backward(logits, normalizer, local, owned, targets != IGNORE)
        return (normalizer - of_target).masked_fill(targets == IGNORE, 0.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        logits, normalizer, local, owned, counted = ctx.saved_tensors
        softmax = _exponentials(logits, normalizer)
        softmax.scatter_add_(-1, local[..., None], -owned[..., None].to(softmax.dtype))
        softmax.mul_((gradient * counted)[..., None])
        return softmax.to(logits.dtype), None, None


def _exponentials(logits: Tensor, shift: Tensor) -> Tensor:
    """exp(logits - shift) in float32, in a tensor of its own."""
    return logits.to(torch.float32, copy=True).sub_(shift[..., None]).exp_()
