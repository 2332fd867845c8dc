"""Token accuracy: the share of the target tokens that come first among the model's predictions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from collie_metrics.samples import share

if TYPE_CHECKING:
    from torch import Tensor


class TokenAccuracy:
    """Two counts. Each token counts the same, so a long sample counts more than a short one."""

    def __init__(self) -> None:
        self.right = self.tokens = 0

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Add ids [N] of the tokens with the highest logits and the ids [N] that were to come.

        Raises `ValueError` for shapes that differ: torch would compare each with each.
        """
        if predictions.shape != targets.shape:
            found, wanted = tuple(predictions.shape), tuple(targets.shape)
            raise ValueError(f"predictions {found}, targets {wanted}: give one predicted id for every target id")
        self.right += int((predictions == targets).sum())
        self.tokens += targets.numel()

    def merge(self, other: TokenAccuracy) -> None:
        """Add the tokens of another rank."""
        self.right += other.right
        self.tokens += other.tokens

    def compute(self) -> Mapping[str, float]:
        """`token_accuracy` from 0 to 1; NaN without tokens."""
        return {"token_accuracy": share(self.right, self.tokens)}
