"""Corpus chrF and chrF++ through sacrebleu."""

from __future__ import annotations

from typing import Any

from sacrebleu.metrics.chrf import CHRF

from collie_metrics.corpus import CorpusMetric


class Chrf(CorpusMetric):
    """For each order the n-grams of the answer, of its best reference, and of both."""

    def __init__(self, **options: Any) -> None:
        """`options` are those of `sacrebleu.CHRF`."""
        super().__init__("chrf", CHRF(**options))
