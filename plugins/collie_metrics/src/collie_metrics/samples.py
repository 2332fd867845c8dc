"""What all metrics of samples share: what they refuse, and the share of a count."""

from __future__ import annotations

import math
from collections.abc import Sequence


def check_pairs(predictions: Sequence[object], targets: Sequence[object]) -> None:
    """Raises `ValueError` unless there is one target for each prediction."""
    if len(predictions) != len(targets):
        raise ValueError(f"predictions={len(predictions)}, targets={len(targets)}: give one of each for every sample")


def check_texts(predictions: Sequence[str], targets: Sequence[Sequence[str]]) -> None:
    """Raises `ValueError` unless there is a list of at least one reference for each prediction."""
    check_pairs(predictions, targets)
    for index, references in enumerate(targets):
        if isinstance(references, str):  # a sequence of texts too, of one character each
            raise ValueError(f"targets[{index}]={references[:40]!r} is one text: give a list of references")
        if not references:
            raise ValueError(f"targets[{index}] is empty: give at least one reference for every sample")


def share(count: int, total: int) -> float:
    """`count / total`; NaN of nothing."""
    return count / total if total else math.nan
