"""What BLEU and chrF have in common: sacrebleu counts n-grams per sample, and the sums of the counts give the score."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from collie_metrics.samples import check_texts

if TYPE_CHECKING:
    from sacrebleu.metrics.base import Metric


class CorpusMetric:
    """The sums of the statistics of all samples, as integers: whatever the split, the score is the same to the bit.

    The three methods of sacrebleu with an underscore are those that its own significance tests resample with.
    """

    def __init__(self, name: str, scorer: Metric) -> None:
        self.name, self.scorer = name, scorer
        self.sums: list[int] = []  # empty before the first sample
        self.reference_counts: set[int] = set()  # how many references samples have: part of the signature

    def update(self, predictions: Sequence[str], targets: Sequence[Sequence[str]]) -> None:
        """Add samples, each with one or more references; raises `ValueError` for lengths that differ."""
        check_texts(predictions, targets)
        streams = list(zip_longest(*targets))  # the first reference of every sample, the second or None, ...
        for row in self.scorer._extract_corpus_statistics(predictions, streams) if predictions else ():
            self._add(row)
        self.reference_counts.update(map(len, targets))

    def merge(self, other: CorpusMetric) -> None:
        """Add the samples of another rank."""
        if other.sums:
            self._add(other.sums)
        self.reference_counts |= other.reference_counts

    def compute(self) -> Mapping[str, float]:
        """The score from 0 to 100 by the metric's name; NaN without samples."""
        return {self.name: self._score().score if self.sums else math.nan}

    def details(self) -> Mapping[str, str]:
        """sacrebleu's line with what the score is made of, and its signature, by which scores can be compared."""
        if not self.sums:
            return {}
        counts = self.reference_counts
        self.scorer.num_refs = next(iter(counts)) if len(counts) == 1 else -1  # -1 as sacrebleu has it: they vary
        return {self.name: self._score().format(), f"{self.name}_signature": str(self.scorer.get_signature())}

    def _add(self, row: Sequence[int]) -> None:
        self.sums = [sum(pair) for pair in zip(self.sums or [0] * len(row), row, strict=True)]

    def _score(self) -> Any:
        return self.scorer._compute_score_from_stats(list(self.sums))
