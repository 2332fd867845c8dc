"""ROUGE through rouge-score: the mean over the samples."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from fractions import Fraction

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer, Tokenizer

from collie_metrics.samples import check_texts

FIELDS = {"f1": "fmeasure", "precision": "precision", "recall": "recall"}  # our names: rouge-score's


class WordTokenizer(Tokenizer):  # type: ignore[misc]  # untyped
    """Runs of letters, numbers and marks of any script, in lower case."""

    def tokenize(self, text: str) -> list[str]:
        """The words."""
        return "".join(char if unicodedata.category(char)[0] in "LNM" else " " for char in text.lower()).split()


class CharacterTokenizer(WordTokenizer):
    """Each letter, number or mark is a token."""

    def tokenize(self, text: str) -> list[str]:
        """The characters."""
        return list("".join(super().tokenize(text)))


class Rouge:
    """Sums of the samples' scores, as fractions: no split changes a bit. The reference with the best F1 counts."""

    def __init__(
        self,
        *,
        rouge_types: Sequence[str] = ("rouge1", "rouge2", "rougeL", "rougeLsum"),
        scores: Sequence[str] = ("f1",),
        use_stemmer: bool = False,
        tokenizer: str = "rouge",
    ) -> None:
        tokenizers = {"words": WordTokenizer, "characters": CharacterTokenizer}
        chosen = tokenizers[tokenizer]() if tokenizer in tokenizers else DefaultTokenizer(use_stemmer)
        # Sentences of Lsum are lines: splitting them itself, rouge-score would need data that nltk downloads.
        self.scorer = RougeScorer(list(rouge_types), split_summaries=False, tokenizer=chosen)
        self.scores = tuple(scores)
        self.sums = {(kind, score): Fraction() for kind in rouge_types for score in scores}
        self.samples = 0

    def update(self, predictions: Sequence[str], targets: Sequence[Sequence[str]]) -> None:
        """Add samples, each with one or more references; raises `ValueError` for lengths that differ."""
        check_texts(predictions, targets)
        for prediction, references in zip(predictions, targets, strict=True):
            best = self.scorer.score_multi(references, prediction)
            for kind, score in self.sums:
                self.sums[kind, score] += Fraction(getattr(best[kind], FIELDS[score]))
        self.samples += len(targets)

    def merge(self, other: Rouge) -> None:
        """Add the samples of another rank."""
        for key, value in other.sums.items():
            self.sums[key] += value
        self.samples += other.samples

    def compute(self) -> Mapping[str, float]:
        """F1 as `rouge1`, others as `rouge1_recall`, from 0 to 1; NaN without samples."""
        return {
            kind if score == "f1" else f"{kind}_{score}": float(value / self.samples) if self.samples else math.nan
            for (kind, score), value in self.sums.items()
        }
