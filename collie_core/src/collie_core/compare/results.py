"""What the cells have found, and what follows: means over seeds, the best learning rate, the ranking."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from collie_core.compare.comparison import result_of
from collie_core.compare.folder import Folder, read
from collie_core.compare.grid import Cell, Grid, Pair, Refusal
from collie_core.report.html import read_metrics
from collie_core.report.rundir import METRICS, SUMMARY

if TYPE_CHECKING:
    from collie_core.config.evaluation import Mode

Floats = NDArray[np.float64]
OWN: dict[str, Mode] = {"loss": "min", "tokens_per_second": "max", "seconds": "min", "peak_memory_bytes": "min"}
LAST = 10  # the training loss of a run is the mean over the last tenth of its rows: single steps are noise
EVAL = "eval/"


class Goal(NamedTuple):
    """A number of a run, and whether less or more of it is better: what decides is one."""

    name: str
    mode: Mode = "min"

    def key(self, value: float) -> float:
        """Ascending from the best."""
        return value if self.mode == "min" else -value


class Spread(NamedTuple):
    """Over seeds. The sample standard deviation needs two of them."""

    mean: float
    std: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


@dataclass(frozen=True)
class Curve:
    """Values [N] of a run at its steps [N], with the tokens that it had read and the seconds that steps had taken."""

    steps: Floats
    tokens: Floats
    seconds: Floats
    values: Floats


@dataclass(frozen=True)
class Found:
    """A cell and what came of it."""

    cell: Cell
    status: str  # done, failed, refused, missing
    reason: str
    seconds: float  # from the start of its process to the end
    rows: Sequence[Mapping[str, Any]]  # of metrics.jsonl

    @classmethod
    def read(cls, folder: Folder, cell: Cell) -> Found:
        """As it stands in the folder."""
        result = result_of(folder, cell)
        rows = read_metrics(folder.run(cell) / METRICS) if result["status"] == "done" else []
        return cls(cell, result["status"], result["reason"], result["seconds"], rows)

    @cached_property
    def numbers(self) -> dict[str, float]:
        """Of a run that is done: how it ended, and how fast it was."""
        steps = [row for row in self.rows if "loss" in row]
        if self.status != "done" or not steps:
            return {}
        last = [_number(row["loss"]) for row in steps[-math.ceil(len(steps) / LAST) :]]
        curve = self.curve("loss")
        first = len(steps) > 1  # it pays for what later ones find done: compiled, allocated, cached
        tokens = curve.tokens[-1] - curve.tokens[0] * first
        found = {
            "steps": steps[-1]["step"],
            "tokens": steps[-1]["tokens"],
            "seconds": float(curve.seconds[-1]),
            "tokens_per_second": float(tokens / (curve.seconds[-1] - curve.seconds[0] * first)),
            "loss": statistics.fmean(last),
            "peak_memory_bytes": max(row["peak_memory_bytes"] for row in steps),
        }
        evaluated = {name: _number(value) for row in self.rows for name, value in row.items() if name.startswith(EVAL)}
        return found | evaluated

    def curve(self, name: str) -> Curve:
        """One number over the run. Rows of evaluations stand where the step before them has ended."""
        points: list[tuple[float, float, float, float]] = []
        step = tokens = seconds = 0.0
        for row in self.rows:
            if "step_time_s" in row:
                seconds += row["step_time_s"] * (row["step"] - step)
                step, tokens = row["step"], row["tokens"]
            if name in row:
                points.append((row["step"], tokens, seconds, _number(row[name])))
        return Curve(*np.array(points, dtype=np.float64).reshape(-1, 4).T)


@dataclass(frozen=True, eq=False)
class Rated:
    """A pair at one learning rate: all of its seeds."""

    pair: Pair
    lr: float
    found: tuple[Found, ...]

    @property
    def done(self) -> list[Found]:
        """The seeds that came to an end, with numbers."""
        return [one for one in self.found if one.numbers]

    def spread(self, name: str) -> Spread | None:
        """A number over the seeds that have it."""
        values = [value for one in self.done if math.isfinite(value := one.numbers.get(name, math.nan))]
        return Spread.of(values) if values else None

    @property
    def names(self) -> list[str]:
        """Of the results of evaluations."""
        return list(dict.fromkeys(name for one in self.done for name in one.numbers if name.startswith(EVAL)))


@dataclass(frozen=True, eq=False)
class Choice:
    """A pair at the learning rate that was best for it, among those it was swept over."""

    best: Rated
    swept: tuple[Rated, ...]
    memory: Mapping[str, Any]

    @property
    def pair(self) -> Pair:
        """Its optimizer and adapter."""
        return self.best.pair

    @property
    def at_edge(self) -> bool:
        """Whether a rate beyond those that were tried might be better still."""
        rates = [one.lr for one in self.swept]
        return len(rates) > 1 and self.best.lr in (min(rates), max(rates))


@dataclass(frozen=True)
class Results:
    """All that a report says."""

    grid: Grid
    found: tuple[Found, ...]
    goal: Goal
    choices: tuple[Choice, ...]  # the best first; those of which no seed came to an end are left out
    memory: Mapping[Pair, Mapping[str, Any]]  # of every pair, as far as it is known
    better: Mapping[str, Mode]  # whether less or more of a number is better, where that is known

    @classmethod
    def read(cls, folder: Folder, grid: Grid) -> Results:
        """As they stand in the folder."""
        found = tuple(Found.read(folder, cell) for cell in grid.cells)
        memory: dict[Pair, Mapping[str, Any]] = {pair: read(folder.memory(pair)) or {} for pair in grid.pairs}
        better = OWN | _better(folder, found)
        goal = _goal(grid, found, better)
        better[goal.name] = goal.mode
        choices = []
        for pair in grid.pairs:
            rates = dict.fromkeys(one.cell.lr for one in found if one.cell.pair == pair)
            rated = tuple(
                Rated(pair, lr, tuple(one for one in found if (one.cell.pair, one.cell.lr) == (pair, lr)))
                for lr in rates
            )
            if any(one.done for one in rated):
                best = min(rated, key=lambda one: _rank(one, goal))
                choices.append(Choice(best, rated, memory[pair]))
        choices.sort(key=lambda choice: _rank(choice.best, goal))
        return cls(grid, found, goal, tuple(choices), memory, better)

    @property
    def without_result(self) -> Iterator[tuple[str, str, str]]:
        """What, how it ended and why, for all that is not done."""
        for refusal in self.grid.refused:
            yield described(refusal), "refused", refusal.reason
        for one in self.found:
            if one.status != "done":
                yield str(one.cell), one.status, one.reason

    @property
    def names(self) -> list[str]:
        """Of the results of evaluations that any run has, as they come; the one that decides is the first."""
        names = dict.fromkeys(name for choice in self.choices for name in choice.best.names)
        return sorted(names, key=lambda name: name != self.goal.name)


def described(refusal: Refusal) -> str:
    """What was refused."""
    return f"{refusal.pair}" if refusal.lr is None else f"{refusal.pair}, lr {refusal.lr:g}"


def _better(folder: Folder, found: Sequence[Found]) -> dict[str, Mode]:
    """What the runs knew of their results: they evaluate alike, so any of them says it."""
    for one in found:
        summary = read(folder.run(one.cell) / SUMMARY) if one.status == "done" else None
        if summary is not None:
            return dict(summary["facts"]["better"])
    return {}


def _goal(grid: Grid, found: Sequence[Found], better: Mapping[str, Mode]) -> Goal:
    """`evaluation.best` where it is said, else the evaluation loss where every run has one, else the training loss."""
    best = grid.base.evaluation.best
    if best is not None:
        return Goal(best.metric, best.mode or better.get(best.metric, "min"))
    done = [one.numbers for one in found if one.numbers]
    return Goal("eval/loss" if all("eval/loss" in numbers for numbers in done) else "loss")


def _rank(rated: Rated, goal: Goal) -> tuple[int, float]:
    """Rates at which every seed comes to an end stand before those at which some fail."""
    spread = rated.spread(goal.name)
    if spread is None:
        return len(rated.found), math.inf
    return len(rated.found) - spread.n, goal.key(spread.mean)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
