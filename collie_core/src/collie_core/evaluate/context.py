"""What an evaluator works with, and what it gives back.

Samples are dealt out to the data-parallel ranks in turns of a batch each, and every rank has as many turns, so ranks
that hold one model together call it together. Of the ranks that share a copy of the model one counts; what it counted
goes to the others as the state of metrics, which does not grow with the data set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from collie_core.data.loader import EMPTY, collate
from collie_core.data.tokenizer import padding_id
from collie_core.engine.pipeline import forward_only
from collie_core.engine.step import stage_forward
from collie_core.errors import RunError
from collie_core.generate import SampleText, generate
from collie_core.hookspecs import DetailedMetric
from collie_core.model.shard import sharded_logits, vocabulary_of
from collie_core.model.virtual_tokens import virtual_tokens_of

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from collie_core.config.data import DataConfig
    from collie_core.data.dataset import TokenizedDataset
    from collie_core.data.loader import Batch
    from collie_core.data.sources import Row
    from collie_core.evaluate.predictions import Predictions
    from collie_core.hookspecs import Metric
    from collie_core.model.shard import Vocabulary
    from collie_core.topology import Topology

T = TypeVar("T")


class Reading(NamedTuple):
    """A metric, and the kind of predictions that it reads; see `Metric`."""

    reads: str
    metric: Metric


@dataclass(frozen=True)
class Outcome:
    """What an evaluation found."""

    results: Mapping[str, float]
    details: Mapping[str, str] = field(default_factory=dict)  # texts that belong to them, such as a signature


@dataclass
class EvaluationContext:
    """A model, samples, and metrics to feed, on one rank. `model` is in evaluation mode and without gradients."""

    name: str
    model: nn.Module  # the whole model, a stage or a share of it, or an engine around it
    tokenizer: PreTrainedTokenizerBase
    topology: Topology
    data: DataConfig
    batch_size: int  # samples of a turn
    seed: int
    readings: Sequence[Reading]
    rows: Callable[[], Iterator[Row]]
    """The samples as they are written, in order."""

    dataset: Callable[..., TokenizedDataset]
    """The samples tokenised as `data:` says; with `whole=True` none is cut, split or left out for its length."""

    precision: Callable[[], AbstractContextManager[Any]]
    predictions: Predictions
    synced: bool = False  # ranks with other samples take part in each forward
    before_turn: Callable[[], None] = lambda: None
    """Called before each turn, on all ranks; it may raise, when the run has to end."""

    @property
    def counts(self) -> bool:
        """Whether this rank counts: it has the logits, and no other rank of its copy of the model counts."""
        return self.topology.tp.rank == 0 and self.topology.pp.rank == self.topology.pp.size - 1

    @property
    def positions(self) -> int | None:
        """The longest text that the model was built for, in tokens; None: nothing says."""
        config: Any = self._inner.config
        limit = getattr(config.get_text_config(), "max_position_embeddings", None)
        return limit - virtual_tokens_of(self._inner).count if isinstance(limit, int) else None

    @property
    def vocabulary(self) -> Vocabulary | None:
        """Which of the logits `forward` gives here; None: all."""
        return vocabulary_of(self.model)

    @property
    def _inner(self) -> nn.Module:
        return cast("nn.Module", getattr(self.model, "module", self.model))

    def deal(self, items: Iterable[T]) -> Iterator[tuple[int, list[T]]]:
        """This rank's share of the items: turn by turn the number of the batch, and its items, in order.

        The last ones may be empty, since every rank gets as many turns. The batches do not depend on the number of
        ranks.
        """
        rest, ranks, first = iter(items), self.topology.dp, 0
        while any(turn := [[*islice(rest, self.batch_size)] for _ in range(ranks.size)]):
            self.before_turn()
            yield first + ranks.rank, turn[ranks.rank]
            first += ranks.size

    def collate(self, samples: Sequence[Any]) -> Batch:
        """A batch of samples (`input_ids`, `labels`), on the device; of one padding token where there are none."""
        rows = [[sample] for sample in samples] or [[EMPTY]]
        batch = collate(rows, pad_token_id=padding_id(self.tokenizer), packing=False)
        return batch.to(self.topology.device)

    def forward(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Tensor | None]]:
        """Each batch with its logits [B, L, V], or this rank's share of them; None on ranks without the last stage."""

        def logits(batch: Batch, hidden: Tensor | None) -> Tensor:
            with self.precision(), sharded_logits(self.model):
                return cast("Tensor", stage_forward(self.model, batch, hidden).logits)

        return forward_only(self.model, iter(batches), logits)

    def generate(self, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
        """New token ids after each prompt; see `collie_core.generate.generate`. There may be no prompts."""
        if not prompts and not self.synced:
            return []
        given: Sequence[Sequence[int]] = prompts
        if not prompts:  # others have some, and need this rank's share of the weights
            given, options = [[padding_id(self.tokenizer)]], options | {"max_new_tokens": 1}
        with self.precision():
            model = cast("PreTrainedModel", self._inner)
            answers = generate(model, self.tokenizer, given, synced=self.synced, **options)
        return answers[: len(prompts)]

    def wants(self, reads: str) -> bool:
        """Whether a metric reads this kind of predictions; the same on every rank."""
        return any(reading.reads == reads for reading in self.readings)

    def feed(self, reads: str, prediction: Any, target: Any) -> None:
        """Give samples to the metrics that read this kind, on the rank that counts; see `Metric`."""
        for reading in self.readings if self.counts and len(prediction) else ():
            if reading.reads == reads:
                reading.metric.update(prediction, target)

    def record(self, rows: Sequence[Mapping[str, Any]], texts: Sequence[SampleText]) -> None:
        """Write a turn to the file of predictions; `texts` are the same for a person. Collective."""
        self.predictions.add(rows if self.counts else (), texts[: self.predictions.show] if self.counts else ())

    def total(self, **counts: int) -> dict[str, int]:
        """The sums of counts over the ranks that count. Collective."""
        found = [own for own in self.topology.gather_objects(counts if self.counts else None) if own is not None]
        return {name: sum(own[name] for own in found) for name in counts}

    def outcome(self, results: Mapping[str, float] | None = None) -> Outcome:
        """`results` and those of the metrics, of all ranks. Collective.

        Raises:
            RunError: one name is given twice.
        """
        numbers: dict[str, float] = dict(results or {})
        details: dict[str, str] = {}
        own = [reading.metric for reading in self.readings]
        for metric, *others in zip(*self.topology.gather_objects(own), strict=True):
            for other in others:
                metric.merge(other)
            found = metric.compute()
            require_new_names(self.name, numbers, found)
            numbers |= found
            if isinstance(metric, DetailedMetric):
                details |= metric.details()
        return Outcome(numbers, details)


def require_new_names(evaluator: str, known: Mapping[str, float], found: Mapping[str, float]) -> None:
    """Refuse results of a metric that have names which are taken.

    Raises:
        RunError: one has such a name.
    """
    if twice := sorted(known.keys() & found.keys()):
        raise RunError(
            f"evaluator {evaluator}: {', '.join(twice)} is given twice; put one of the metrics into another evaluator "
            "with a name of its own"
        )
