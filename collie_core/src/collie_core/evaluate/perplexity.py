"""Perplexity: exp of the mean negative log-likelihood per target token, over the whole set."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from collie_core.data.loader import IGNORE
from collie_core.errors import ConfigError, Problem
from collie_core.evaluate.scoring import target_scores

if TYPE_CHECKING:
    from torch import Tensor

    from collie_core.data.dataset import TokenizedDataset
    from collie_core.data.loader import Batch
    from collie_core.evaluate.context import EvaluationContext, Outcome


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


class Window(NamedTuple):
    """The tokens `begin` to `stop` of a sample, of which those from `score` on count."""

    sample: int
    begin: int
    stop: int
    score: int


class PerplexityEvaluator:
    """Feeds metrics of token losses, and of the tokens that the model expects.

    Args:
        stride: how far a window moves over a sample that is longer than it; None: samples are cut as `data:` says.
        window: its tokens; None: `data.max_length`.
    """

    def __init__(self, stride: int | None = None, window: int | None = None) -> None:
        self.stride = stride
        self.window = window

    def evaluate(self, context: EvaluationContext) -> Outcome:
        """See `Evaluator`.

        Raises:
            ConfigError: the window is longer than what the model was built for, or does not overlap the next.
        """
        dataset = context.dataset(whole=self.stride is not None)
        expected = context.wants("token_ids")
        for batch, logits in context.forward(self._batches(context, dataset)):
            if logits is not None:
                scores = target_scores(logits, batch.labels, context.vocabulary, expected=expected)
                context.feed("token_losses", scores.losses, scores.ids)
                if scores.expected is not None:
                    context.feed("token_ids", scores.expected, scores.ids)
        return context.outcome()

    def _batches(self, context: EvaluationContext, dataset: TokenizedDataset) -> Iterator[Batch]:
        lengths = map(int, dataset.lengths)
        if self.stride is None:
            found: Iterable[Window] = (Window(sample, 0, length, 0) for sample, length in enumerate(lengths))
        else:
            size = self._size(context, self.stride)
            stride = self.stride
            found = (part for sample, length in enumerate(lengths) for part in windows(sample, length, size, stride))
        for _, share in context.deal(found):
            yield context.collate([_cut(dataset[part.sample], part) for part in share])

    def _size(self, context: EvaluationContext, stride: int) -> int:
        size, limit = self.window or context.data.max_length, context.positions
        if limit is not None and size > limit:
            raise _refusal("window", f"is longer than the {limit} positions of the model", size, "Set it lower.")
        if stride >= size:
            raise _refusal(
                "stride",
                f"must be below the window of {size} tokens, so that every token has one before it",
                stride,
                "Set it lower.",
            )
        return size


def windows(sample: int, length: int, size: int, stride: int) -> Iterator[Window]:
    """Windows of `size` tokens over a sample, each `stride` after the one before; every token counts in one."""
    scored = 0
    for begin in range(0, length, stride):
        stop = min(begin + size, length)
        yield Window(sample, begin, stop, scored)
        scored = stop
        if stop == length:
            return


def _cut(sample: Mapping[str, Any], part: Window) -> dict[str, Any]:
    labels = sample["labels"][part.begin : part.stop].copy()
    labels[: part.score - part.begin] = IGNORE
    return {"input_ids": sample["input_ids"][part.begin : part.stop], "labels": labels}


def _refusal(field: str, rule: str, value: int, hint: str) -> ConfigError:
    return ConfigError([Problem(f"evaluation.evaluators: perplexity.{field}", rule, value, hint)])
