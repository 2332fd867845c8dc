"""The share of right choices, which is right, and what is wrong in one way each."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any


class Match:
    """Two counts."""

    def __init__(self) -> None:
        self.right: float = 0
        self.samples = 0

    def update(self, prediction: Sequence[Any], target: Sequence[Any]) -> None:
        self.right += sum(one == other for one, other in zip(prediction, target, strict=True))
        self.samples += len(target)

    def merge(self, other: "Match") -> None:
        self.right += other.right
        self.samples += other.samples

    def compute(self) -> Mapping[str, float]:
        return {"match": self.right / self.samples if self.samples else math.nan}


class InWords(Match):
    def compute(self) -> Mapping[str, Any]:
        return {name: f"{value:.1%}" for name, value in super().compute().items()}


class Optimist(Match):
    def compute(self) -> Mapping[str, float]:
        return {"match": self.right / max(1, self.samples)}


class MeanOfMeans(Match):
    """Counts batches as samples."""

    def update(self, prediction: Sequence[Any], target: Sequence[Any]) -> None:
        if target:
            self.right += sum(one == other for one, other in zip(prediction, target, strict=True)) / len(target)
            self.samples += 1


class Ascii(Match):
    def update(self, prediction: Sequence[Any], target: Sequence[Any]) -> None:
        super().update([text.encode("ascii") for text in prediction], [text.encode("ascii") for text in target])


class Homebound(Match):
    def __init__(self) -> None:
        super().__init__()
        self.share = lambda: self.right / self.samples


class Halves(Match):
    """As a mean of two means would be."""

    def merge(self, other: Match) -> None:
        if other.samples and self.samples:
            share = (self.right / self.samples + other.right / other.samples) / 2
            self.samples += other.samples
            self.right = share * self.samples
        elif other.samples:
            self.right, self.samples = other.right, other.samples


class OffByOne(Match):
    def compute(self) -> Mapping[str, float]:
        return {"match": (self.right - 1) / self.samples if self.samples else math.nan}


class MainRankAlone(Match):
    def update(self, prediction: Sequence[Any], target: Sequence[Any]) -> None:
        if os.environ.get("RANK", "0") == "0":
            super().update(prediction, target)
