"""What a model says of the target tokens: their losses, and the ids that it expects in their places.

Shapes: B rows, L positions, V outputs of the head, N target tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from collie_core.data.loader import IGNORE
from collie_core.model.shard import Vocabulary, cross_entropy


class TargetScores(NamedTuple):
    """Of the target tokens of a batch, row after row."""

    losses: Tensor  # [N] float32, in nats
    ids: Tensor  # [N]
    expected: Tensor | None  # [N], the ids with the highest logits, where they were asked for


def target_scores(
    logits: Tensor, labels: Tensor, vocabulary: Vocabulary | None = None, *, expected: bool = False
) -> TargetScores:
    """Losses and ids of the target tokens.

    `logits` [B, L, V], or of this rank's share of the vocabulary, at a position predict the token after it; `labels`
    [B, L] hold targets at their own position, -100 elsewhere. With `vocabulary` collective over its ranks.
    """
    targets = labels[:, 1:]
    chosen = targets != IGNORE
    ids = targets[chosen]
    wanted = logits[:, :-1][chosen]  # [N, V]
    if vocabulary is None:
        losses = F.cross_entropy(wanted.float(), ids, reduction="none")
    else:
        losses = cross_entropy(wanted, ids, vocabulary)
    return TargetScores(losses, ids, highest(wanted, vocabulary) if expected else None)


def highest(logits: Tensor, vocabulary: Vocabulary | None) -> Tensor:
    """The id of the highest of the logits [N, V], the first of equals; also where ranks share the vocabulary."""
    if vocabulary is None:
        return logits.argmax(-1)
    values, places = logits.float().max(-1)
    largest = values.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=vocabulary.axis.group)
    beyond = torch.iinfo(torch.int64).max
    ids = (places + vocabulary.begin).masked_fill(values < largest, beyond)
    dist.all_reduce(ids, op=dist.ReduceOp.MIN, group=vocabulary.axis.group)
    return ids


def targets_per_row(labels: Tensor) -> list[int]:
    """How many of the N target tokens are of each row."""
    counts: list[int] = (labels[:, 1:] != IGNORE).sum(1).tolist()
    return counts


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout and without gradients; afterwards the model is in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
