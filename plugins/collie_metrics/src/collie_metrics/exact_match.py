"""Exact match: the share of the answers that equal one of their references."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Literal

from collie_metrics.samples import check_texts, share

ARTICLES = re.compile(r"\b(a|an|the)\b", re.IGNORECASE)


def is_punctuation(character: str) -> bool:
    """Symbols of ASCII as SQuAD's script has them, and what Unicode calls punctuation."""
    return character in string.punctuation or unicodedata.category(character).startswith("P")


class ExactMatch:
    """Two counts. By default texts are compared as they are, less the spaces around them."""

    def __init__(
        self,
        *,
        strip: bool = True,
        ignore_case: bool = False,
        ignore_punctuation: bool = False,
        ignore_articles: bool = False,
        ignore_spacing: bool = False,
        unicode_form: Literal["NFC", "NFKC"] | None = None,
    ) -> None:
        self.strip, self.ignore_case, self.ignore_punctuation = strip, ignore_case, ignore_punctuation
        self.ignore_articles, self.ignore_spacing, self.unicode_form = ignore_articles, ignore_spacing, unicode_form
        self.right = self.samples = 0

    def update(self, predictions: Sequence[str], targets: Sequence[Sequence[str]]) -> None:
        """Add samples, each with one or more references; raises `ValueError` for lengths that differ."""
        check_texts(predictions, targets)
        for prediction, references in zip(predictions, targets, strict=True):
            self.right += self.normalise(prediction) in map(self.normalise, references)
        self.samples += len(targets)

    def merge(self, other: ExactMatch) -> None:
        """Add the samples of another rank."""
        self.right += other.right
        self.samples += other.samples

    def compute(self) -> Mapping[str, float]:
        """`exact_match` from 0 to 1; NaN without samples."""
        return {"exact_match": share(self.right, self.samples)}

    def normalise(self, text: str) -> str:
        """The text less what makes no difference, in the order of SQuAD's script."""
        if self.unicode_form:
            text = unicodedata.normalize(self.unicode_form, text)
        if self.ignore_case:
            text = text.casefold()
        if self.ignore_punctuation:
            text = "".join(character for character in text if not is_punctuation(character))
        if self.ignore_articles:
            text = ARTICLES.sub(" ", text)
        if self.ignore_spacing:
            text = " ".join(text.split())
        return text.strip() if self.strip else text
