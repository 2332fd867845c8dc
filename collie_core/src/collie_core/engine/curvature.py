"""Labels drawn from the model's own distribution, for optimizers that estimate curvature from their gradients.

The Gauss-Newton-Bartlett estimator (arXiv 2305.14342, Algorithm 2) takes the gradient of the loss of such labels. Which
label a target gets depends on the seed, the sample's position in the run and the target's place in it, so every
topology draws the same.

Shapes: B rows, L positions, N targets at a time, V entries of the vocabulary that this rank has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from collie_core.data.loader import IGNORE
from collie_core.model.collectives import gathered

if TYPE_CHECKING:
    from collie_core.data.loader import Batch
    from collie_core.model.vocabulary import Vocabulary

Relabel = Callable[[Tensor, "Batch", "Vocabulary | None"], Tensor]
"""(logits [B, L, V], micro-batch, which logits these are or None: all) -> labels [B, L] to take instead of its own."""

TARGETS = 256  # at a time: their distributions are held in float64


def drawn_labels(seed: int) -> Relabel:
    """The `Relabel` that draws every target of a micro-batch from the distribution that the logits give."""

    @torch.no_grad()
    def relabel(logits: Tensor, batch: Batch, vocabulary: Vocabulary | None) -> Tensor:
        labels = batch.labels.clone()
        rows, places = (batch.labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
        chances = _chances(seed, batch).to(logits.device)
        for row, place in zip(rows.split(TARGETS), places.split(TARGETS), strict=True):
            labels[row, place + 1] = _draw(logits.detach()[row, place], chances[row, place + 1], vocabulary)
        return labels

    return relabel


def _chances(seed: int, batch: Batch) -> Tensor:
    """A uniform number in [0, 1) for every position of every sample, [B, L] float64."""
    chances = torch.zeros(batch.labels.shape, dtype=torch.float64)
    for row, samples in enumerate(batch.layout):
        begin = 0
        for position, tokens in samples:
            digest = hashlib.blake2b(repr((seed, "labels", position)).encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            chances[row, begin : begin + tokens] = torch.rand(tokens, dtype=torch.float64, generator=generator)
            begin += tokens
    return chances


def _draw(logits: Tensor, chances: Tensor, vocabulary: Vocabulary | None) -> Tensor:
    """For `logits` [N, V] and `chances` [N]: the entry in which each chance falls, [N] int64, by the inverse of the
    cumulative distribution. The ranks of a shared vocabulary take part together and all get the answer.
    """
    largest = logits.float().amax(-1, keepdim=True)
    if vocabulary is not None:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=vocabulary.axis.group)
    # Not by cumsum's own dtype, which makes the same copy where a plan of memory does not see it.
    cumulative = (logits.float() - largest).exp_().double().cumsum(-1)
    if vocabulary is None:
        return _entry(cumulative, chances * cumulative[:, -1])
    ends = torch.stack(gathered(cumulative[:, -1], vocabulary.axis)).cumsum(0)  # [ranks, N]
    wanted = chances * ends[-1]
    owner = (ends <= wanted).sum(0).clamp(max=vocabulary.axis.size - 1)
    before = ends[vocabulary.axis.rank] - cumulative[:, -1]
    entry = vocabulary.begin + _entry(cumulative, wanted - before)
    drawn = entry.where(owner == vocabulary.axis.rank, 0)
    dist.all_reduce(drawn, group=vocabulary.axis.group)
    return drawn


def _entry(cumulative: Tensor, wanted: Tensor) -> Tensor:
    found = torch.searchsorted(cumulative, wanted[:, None], right=True).squeeze(-1)
    return found.clamp(0, cumulative.shape[-1] - 1)
