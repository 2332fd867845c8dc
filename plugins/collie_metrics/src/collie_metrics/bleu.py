"""Corpus BLEU through sacrebleu."""

from __future__ import annotations

from typing import Any

from sacrebleu.metrics.bleu import BLEU

from collie_metrics.corpus import CorpusMetric


class Bleu(CorpusMetric):
    """Lengths, and matched and possible n-grams of each order."""

    def __init__(self, **options: Any) -> None:
        """`options` are those of `sacrebleu.BLEU`."""
        # force: no warning about tokenised texts, which would count those of one batch and not of the set
        super().__init__("bleu", BLEU(force=True, **options))
