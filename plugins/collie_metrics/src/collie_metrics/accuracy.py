"""Accuracy: the share of the choices that are right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from collie_metrics.samples import check_pairs, share


class Accuracy:
    """Two counts. A prediction that is no class at all is wrong as any other."""

    def __init__(self) -> None:
        self.right = self.samples = 0

    def update(self, predictions: Sequence[str | int], targets: Sequence[str | int]) -> None:
        """Add samples; raises `ValueError` for lengths that differ."""
        check_pairs(predictions, targets)
        self.right += sum(prediction == target for prediction, target in zip(predictions, targets, strict=True))
        self.samples += len(targets)

    def merge(self, other: Accuracy) -> None:
        """Add the samples of another rank."""
        self.right += other.right
        self.samples += other.samples

    def compute(self) -> Mapping[str, float]:
        """`accuracy` from 0 to 1; NaN without samples."""
        return {"accuracy": share(self.right, self.samples)}
