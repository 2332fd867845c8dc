"""The next token of each row: greedy, or drawn with the row's own random numbers, so that no row disturbs another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

GREEDY_BELOW = 1e-5  # a temperature at which float32 cannot tell drawing from taking the likeliest


@dataclass(frozen=True)
class Sampling:
    """How one answer is written."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None  # the likeliest tokens to name at each place; None: not even the chosen one

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken each time."""
        return self.temperature < GREEDY_BELOW

    def generator(self) -> torch.Generator:
        """The random numbers of the answer: on the CPU, so that a seed means the same everywhere."""
        return torch.Generator().manual_seed(self.seed)


class Likelihood(NamedTuple):
    """A chosen token and its logarithmic probability before temperature, beside those of the likeliest ones."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def choose(logits: Tensor, sampling: list[Sampling], generators: list[torch.Generator]) -> list[int]:
    """A token for each row of `logits`, [B, V] in float32."""
    likeliest = logits.argmax(-1).tolist()
    return [
        token if way.greedy else _draw(row, way, generator)
        for token, row, way, generator in zip(likeliest, logits, sampling, generators, strict=True)
    ]


def likelihood(logits: Tensor, token: int, count: int) -> Likelihood:
    """What `logits`, [V], say of `token`, and of the `count` likeliest tokens."""
    logprobs = logits.log_softmax(-1)
    top = logprobs.topk(min(count, len(logprobs)))
    named = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return Likelihood(token, float(logprobs[token]), named)


def _draw(logits: Tensor, way: Sampling, generator: torch.Generator) -> int:
    scores = (logits.cpu() - logits.max().cpu()) / way.temperature  # at most 0: a low temperature cannot overflow
    if 0 < way.top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(way.top_k).values[-1], -torch.inf)
    probabilities = scores.softmax(-1)
    if way.top_p < 1:
        ordered, places = probabilities.sort(descending=True, stable=True)
        outside = ordered.cumsum(-1) - ordered >= way.top_p  # what comes before is enough already
        outside[0] = False  # also where so small a mass is 0 in float32
        probabilities[places[outside]] = 0
    return int(torch.multinomial(probabilities, 1, generator=generator))
