"""Samples as text: a few answers beside their references, and the mean length of all."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from collie_metrics.samples import check_texts, share

Row = tuple[tuple[str, ...], str]  # references, answer


def chosen(rows: Iterable[Row], count: int) -> list[Row]:
    """The `count` rows that come first in an order that only the texts decide, so that no split changes it.

    References come by their hash: a random choice, but the same at every evaluation. Rows with the same references, as
    in a task with classes, come one of each at a time, by their answer.
    """
    answers: defaultdict[tuple[str, ...], set[str]] = defaultdict(set)
    for references, answer in rows:
        answers[references].add(answer)
    ordered = [
        (turn, hashlib.sha256(json.dumps(references).encode()).digest(), references, answer)
        for references, found in answers.items()
        for turn, answer in enumerate(sorted(found))
    ]
    return [(references, answer) for _, _, references, answer in sorted(ordered)[:count]]


class Decode:
    """At most `rows` different rows of text."""

    def __init__(self, rows: int = 10) -> None:
        self.count = rows
        self.rows: list[Row] = []
        self.characters = self.samples = 0

    def update(self, predictions: Sequence[str], targets: Sequence[Sequence[str]]) -> None:
        """Add samples, each with one or more references; raises `ValueError` for lengths that differ."""
        check_texts(predictions, targets)
        found = zip(map(tuple, targets), predictions, strict=True)
        self.rows = chosen([*self.rows, *found], self.count)
        self.characters += sum(map(len, predictions))
        self.samples += len(predictions)

    def merge(self, other: Decode) -> None:
        """Join the samples of another rank. A row that is dropped here would not be among the first of all either."""
        self.rows = chosen([*self.rows, *other.rows], self.count)
        self.characters += other.characters
        self.samples += other.samples

    def compute(self) -> Mapping[str, float]:
        """`decode_characters`, the mean length of an answer; NaN without samples."""
        return {"decode_characters": share(self.characters, self.samples)}

    def details(self) -> Mapping[str, str]:
        """`decode`: one line of JSON for each row, with `prediction` and `targets`."""
        rows = ({"prediction": answer, "targets": references} for references, answer in self.rows)
        return {"decode": "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)} if self.rows else {}
