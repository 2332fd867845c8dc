"""What is compared: every optimizer with every adapter, at each of its learning rates, from each seed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from collie_core.config.aliases import ALIASES
from collie_core.config.loading import dump_value
from collie_core.config.run import RunConfig
from collie_core.errors import ConfigError, RunError

NONE = "none"  # the adapter of a run that trains all weights
CELLS = "cells"
ALL = ""  # the optimizer of learning rates that are for every one

T = TypeVar("T")


class Pair(NamedTuple):
    """An optimizer with an adapter."""

    optimizer: str
    adapter: str

    def __str__(self) -> str:
        return self.optimizer if self.adapter == NONE else f"{self.optimizer}, {self.adapter}"

    @property
    def stem(self) -> str:
        """It in the name of a file."""
        return "-".join(re.sub(r"[^\w.]+", "_", name) for name in self)


@dataclass(frozen=True)
class Cell:
    """One run: the file of the comparison with `overrides`."""

    pair: Pair
    lr: float
    seed: int
    overrides: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.pair}, lr {self.lr:g}, seed {self.seed}"

    @property
    def name(self) -> str:
        """Of its folder and of the files beside it."""
        return f"{self.pair.stem}-lr{self.lr!r}-seed{self.seed}"


class Refusal(NamedTuple):
    """What CoLLiE does not do: an optimizer with an adapter in this run, at one of its rates or at all."""

    pair: Pair
    lr: float | None
    reason: str


@dataclass(frozen=True)
class Asked:
    """The words of the command line."""

    config: str
    overrides: Sequence[str]
    optimizers: Sequence[str]
    adapters: Sequence[str]
    rates: Mapping[str, Sequence[float]]  # of each optimizer by name, or of `ALL`; none: the optimizer's own
    seeds: Sequence[int]  # none: that of the file
    output: Path

    def rates_of(self, optimizer: str) -> Sequence[float]:
        """Those that an optimizer is swept over; none: it is not."""
        return self.rates.get(optimizer, self.rates.get(ALL, ()))


@dataclass(frozen=True)
class Grid:
    """All cells, in the order in which they run, and what is refused."""

    base: RunConfig  # the file, with the overrides that are not of one optimizer or adapter
    own: tuple[str, ...]  # the overrides that are
    pairs: tuple[Pair, ...]
    cells: tuple[Cell, ...]
    refused: tuple[Refusal, ...]

    @classmethod
    def of(cls, asked: Asked, *, notes: list[str] | None = None) -> Grid:
        """Find and check every run.

        Raises:
            CollieError: the file is no run, a name is unknown, or the same is said twice.
        """
        _require_once(asked)
        own = [text for text in asked.overrides if _key(text).partition(".")[0] in ("optimizer", "adapter")]
        common = [text for text in asked.overrides if text not in own]
        common.append(f"train.output_dir={dump_value(str(asked.output))}")
        base = RunConfig.from_yaml(asked.config, common, notes=notes, complete=True)
        _require_different(base, "optimizer", asked.optimizers)
        _require_different(base, "adapter", [name for name in asked.adapters if name != NONE])
        pairs = tuple(Pair(optimizer, adapter) for optimizer in asked.optimizers for adapter in asked.adapters)
        cells: list[Cell] = []
        refused: list[Refusal] = []
        for pair in pairs:
            rates: Sequence[float | None] = asked.rates_of(pair.optimizer) or [None]
            for lr in rates:
                try:
                    cells += _cells(asked, base, pair, lr)
                except ConfigError as error:
                    refused.append(Refusal(pair, lr, str(error)))
        return cls(base, tuple(own), pairs, tuple(cells), tuple(refused))


def _cells(asked: Asked, base: RunConfig, pair: Pair, lr: float | None) -> Iterator[Cell]:
    overrides = [*_sections(base, pair), *(text for text in asked.overrides if _concerns(text, pair))]
    overrides += [] if lr is None else [f"optimizer.lr={lr!r}"]
    config = RunConfig.from_yaml(asked.config, overrides, notes=[], complete=True)
    for seed in asked.seeds or [base.train.seed]:
        cell = Cell(pair, config.optimizer.lr, seed, tuple(overrides))
        yield Cell(pair, cell.lr, seed, (*overrides, *_places(asked.output, config, cell.name, seed)))


def _sections(base: RunConfig, pair: Pair) -> Iterator[str]:
    """The section of the file stays where it is of the same plugin; another begins with its defaults."""
    find = base.registry.find
    if find("optimizer", pair.optimizer) != find("optimizer", base.optimizer.type):
        yield f"optimizer={dump_value({'type': pair.optimizer})}"
    if pair.adapter == NONE:
        yield "adapter=null"
    elif base.adapter is None or find("adapter", pair.adapter) != find("adapter", base.adapter.type):
        yield f"adapter={dump_value({'type': pair.adapter})}"


def _places(output: Path, config: RunConfig, name: str, seed: int) -> Iterator[str]:
    """What no two runs may share."""
    yield f"train.seed={seed}"
    yield f"train.output_dir={dump_value(str(output / CELLS / name))}"
    if config.checkpoint.store is not None:
        yield f"checkpoint.store={dump_value(f'{config.checkpoint.store}/{name}')}"


def _key(override: str) -> str:
    """Which it sets; by the name here, where it has that of another tool."""
    key = override.partition("=")[0].strip()
    alias = ALIASES.get(key.rpartition(".")[2])
    return key if alias is None else alias.target


def _concerns(override: str, pair: Pair) -> bool:
    return not (pair.adapter == NONE and _key(override).startswith("adapter."))


def _require_once(asked: Asked) -> None:
    """Refuse keys that have an option of their own here."""
    options = dict.fromkeys(("optimizer", "optimizer.type"), "--optimizers")
    options |= dict.fromkeys(("adapter", "adapter.type"), "--adapters")
    options["train.output_dir"] = "--output"
    options |= {"train.seed": "--seeds"} if asked.seeds else {}
    options |= {"optimizer.lr": "--learning-rates"} if asked.rates else {}
    for text in asked.overrides:
        if option := options.get(_key(text)):
            raise RunError(f"{text}: every run of a comparison has its own; say it by {option}")
    for optimizer in asked.rates:
        if optimizer not in (ALL, *asked.optimizers):
            raise RunError(f"--learning-rates {optimizer}=...: {optimizer} is none of --optimizers")


def _require_different(base: RunConfig, kind: str, names: Sequence[str]) -> None:
    """Refuse names that nobody has, and two of one plugin."""
    known: dict[str, str] = {}
    for name in names:
        first = known.setdefault(base.registry.find(kind, name).qualified, name)
        if first != name:
            raise RunError(f"--{kind}s: {name!r} and {first!r} are one {kind}; leave one of them out")


# -- from words ---------------------------------------------------------------------------------------------


def parse_list(option: str, text: str, read: Callable[[str], T]) -> list[T]:
    """What stands between commas.

    Raises:
        RunError: nothing does, `read` refuses it, or it is there twice.
    """
    found: list[T] = []
    for word in map(str.strip, text.split(",")):
        try:
            value = read(word)
        except ValueError as error:
            raise RunError(f"{option} {text}: {word!r} {error}") from error
        if value in found:
            raise RunError(f"{option} {text}: {word!r} is there twice")
        found.append(value)
    return found


def parse_rates(words: Sequence[str]) -> dict[str, list[float]]:
    """`1e-4,3e-4` is for all optimizers, and `lion=3e-5,1e-4` for one of them."""
    found: dict[str, list[float]] = {}
    for word in words:
        optimizer, _, rates = word.rpartition("=")
        if optimizer in found:
            raise RunError(f"--learning-rates {word}: they are said twice; put commas between them")
        found[optimizer] = parse_list("--learning-rates", rates, rate)
    return found


def name(word: str) -> str:
    """Of a plugin."""
    if not word:
        raise ValueError("is no name")
    return word


def rate(word: str) -> float:
    """A learning rate."""
    try:
        value = float(word)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ValueError("must be a number above 0")
    return value


def seed(word: str) -> int:
    """A seed, as `train.seed` has it."""
    if not word.isdecimal() or int(word) >= 2**31:
        raise ValueError("must be a whole number from 0 to 2147483647")
    return int(word)
