"""Precision, recall and F1 of classes, from three counts per class; the definitions of scikit-learn."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from collie_metrics.samples import check_pairs, share

Label = str | int


class Scores(NamedTuple):
    """Of one class, or of an average."""

    precision: float
    recall: float
    f1: float


def scores(hits: int, predicted: int, actual: int) -> Scores:
    """Of samples of a class that were found, those that were said to be of it, and those that are: 0 where 0 / 0."""
    return Scores(
        hits / predicted if predicted else 0.0,
        hits / actual if actual else 0.0,
        2 * hits / (predicted + actual) if predicted + actual else 0.0,
    )


def mean(rows: Sequence[Scores], weights: Sequence[int]) -> Scores:
    """The weighted mean; the order of the rows makes no difference."""
    columns = zip(*rows, strict=True)
    total = sum(weights)
    return Scores(*(math.fsum(map(float.__mul__, column, map(float, weights))) / total for column in columns))


class F1:
    """Counts per class. Without `labels` the classes are all that occur, as targets or as predictions."""

    def __init__(
        self,
        average: Sequence[str] = ("micro", "macro", "weighted"),
        labels: Sequence[Label] | None = None,
        positive: Label | None = None,
    ) -> None:
        self.average, self.labels, self.positive = tuple(average), labels, positive
        self.hits: Counter[Label] = Counter()
        self.predicted: Counter[Label] = Counter()
        self.actual: Counter[Label] = Counter()
        self.samples = 0

    def update(self, predictions: Sequence[Label], targets: Sequence[Label]) -> None:
        """Add samples; raises `ValueError` for lengths that differ and for a target that is none of `labels`."""
        check_pairs(predictions, targets)
        for target in targets:
            if self.labels is not None and target not in self.labels:
                raise ValueError(f"target {target!r} is none of labels={list(self.labels)}: add it to them")
        self.actual.update(targets)
        self.predicted.update(item for item in predictions if self.labels is None or item in self.labels)
        self.hits.update(target for item, target in zip(predictions, targets, strict=True) if item == target)
        self.samples += len(targets)

    def merge(self, other: F1) -> None:
        """Add the samples of another rank."""
        self.hits.update(other.hits)
        self.predicted.update(other.predicted)
        self.actual.update(other.actual)
        self.samples += other.samples

    def compute(self) -> Mapping[str, float]:
        """`precision_macro`, `recall_macro`, `f1_macro` and so on for each average, from 0 to 1; NaN without samples.

        With `positive` also `precision`, `recall` and `f1` of that class; with `labels` also `unknown_predictions`,
        the share of the predictions that are none of them.
        """
        rows = {f"_{average}": self._averaged(average) for average in self.average}
        if self.positive is not None:
            rows[""] = self._of(self.positive) if self.samples else Scores(math.nan, math.nan, math.nan)
        numbers = {f"{name}{suffix}": value for suffix, row in rows.items() for name, value in row._asdict().items()}
        if self.labels is not None:
            numbers["unknown_predictions"] = share(self.samples - self.predicted.total(), self.samples)
        return numbers

    def _of(self, label: Label) -> Scores:
        return scores(self.hits[label], self.predicted[label], self.actual[label])

    def _averaged(self, average: str) -> Scores:
        if not self.samples:
            return Scores(math.nan, math.nan, math.nan)
        if average == "micro":
            return scores(self.hits.total(), self.predicted.total(), self.actual.total())
        classes = self.labels if self.labels is not None else list(self.actual | self.predicted)
        weights = [self.actual[label] if average == "weighted" else 1 for label in classes]
        return mean([self._of(label) for label in classes], weights)
