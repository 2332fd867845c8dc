"""Perplexity: exp of the mean negative log-likelihood per target token, over the whole set."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from collie_core.engine.pipeline import forward_only
from collie_core.engine.step import stage_forward
from collie_core.model.shard import Vocabulary, cross_entropy, sharded_logits, vocabulary_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from collie_core.data.loader import Batch
    from collie_core.hookspecs import Metric


class Perplexity:
    """Token-weighted: a long sample counts more than a short one. Sums are kept in float64."""

    def __init__(self) -> None:
        self.total = 0.0  # nats
        self.tokens = 0

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add token losses [N] in nats; `target` are their ids [N]."""
        self.total += prediction.double().sum().item()
        self.tokens += target.numel()

    def merge(self, other: Perplexity) -> None:
        """Add the tokens of another rank."""
        self.total += other.total
        self.tokens += other.tokens

    def compute(self) -> Mapping[str, float]:
        """`loss` in nats per token and `perplexity`; NaN for an empty set, inf when exp overflows."""
        if self.tokens == 0:
            return {"loss": math.nan, "perplexity": math.nan}
        loss = self.total / self.tokens
        return {"loss": loss, "perplexity": math.exp(loss) if loss < 709 else math.inf}


def token_losses(logits: Tensor, labels: Tensor, vocabulary: Vocabulary | None = None) -> tuple[Tensor, Tensor]:
    """Losses [N] in nats and ids [N] of the target tokens.

    `logits` [B, L, V], or of this rank's share of the vocabulary, at a position predict the token after it; `labels`
    [B, L] hold targets at their own position, -100 elsewhere.
    """
    targets = labels[:, 1:]
    chosen = targets != -100
    ids = targets[chosen]
    wanted = logits[:, :-1][chosen]
    if vocabulary is not None:
        return cross_entropy(wanted, ids, vocabulary), ids
    return F.cross_entropy(wanted.float(), ids, reduction="none"), ids


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


def feed(
    metrics: Sequence[Metric], model: nn.Module, batches: Iterable[Batch], precision: AbstractContextManager[Any]
) -> None:
    """Run the model over `batches` and give each metric the token losses; in a pipeline, on its last stage.

    Tensor-parallel ranks all get the same losses: only one of them may be counted.
    """

    def forward(batch: Batch, hidden: Tensor | None) -> Tensor:
        with precision, sharded_logits(model):
            return stage_forward(model, batch, hidden).logits  # type: ignore[no-any-return]

    vocabulary = vocabulary_of(model)
    for batch, logits in forward_only(model, iter(batches), forward):
        if logits is not None:
            losses, ids = token_losses(logits, batch.labels, vocabulary)
            for metric in metrics:
                metric.update(losses, ids)
