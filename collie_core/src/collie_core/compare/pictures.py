"""The pictures of a comparison: a colour for each optimizer, a kind of line and mark for each adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from collie_core.compare.grid import Pair
from collie_core.compare.results import EVAL, Floats, Rated, Results
from collie_core.report.charts import (
    SERIES,
    VARIABLES,
    drawn,
    furnish,
    short,
    short_count,
    short_lr,
    smoothed,
    thinned,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DASHES = ((0, ()), (0, (4, 1.6)), (0, (1.2, 1.4)), (0, (6, 1.6, 1.2, 1.6)))  # offset, and lengths of ink and gap
MARKS = "osD^"
TITLES = {
    "loss": "training loss",
    "eval/loss": "evaluation loss",
    "tokens_per_second": "tokens/s",
    "seconds": "time",
    "peak_memory_bytes": "peak of the run",
}
ROOM = 1.15  # above where losses begin; what is higher has left the picture


class Look(NamedTuple):
    """How a pair is drawn."""

    color: str
    dash: tuple[float, tuple[float, ...]]
    mark: str

    @property
    def swatch(self) -> str:
        """A piece of its line, as an element of a page."""
        dashes = f' stroke-dasharray="{" ".join(f"{3 * length:g}" for length in self.dash[1])}"' if self.dash[1] else ""
        line = f'<line x1="1" y1="6" x2="33" y2="6" stroke="{VARIABLES[self.color]}" stroke-width="3"{dashes}/>'
        return f'<svg class="swatch" viewBox="0 0 34 12" aria-hidden="true">{line}</svg>'


class Drawn(NamedTuple):
    """A picture of a page."""

    title: str
    svg: str


def looks(results: Results) -> dict[Pair, Look]:
    """Of every pair of the grid, whatever came of it: another run of more seeds looks alike."""
    optimizers = list(dict.fromkeys(pair.optimizer for pair in results.grid.pairs))
    adapters = list(dict.fromkeys(pair.adapter for pair in results.grid.pairs))
    return {
        pair: Look(
            SERIES[optimizers.index(pair.optimizer) % len(SERIES)],
            DASHES[adapters.index(pair.adapter) % len(DASHES)],
            MARKS[adapters.index(pair.adapter) % len(MARKS)],
        )
        for pair in results.grid.pairs
    }


def legend(results: Results) -> Iterator[str]:
    """The pairs that are drawn, the best first."""
    styles = looks(results)
    for choice in results.choices:
        yield f"<li>{styles[choice.pair].swatch}{escape(str(choice.pair))}</li>"


def pictures(results: Results) -> Iterator[Drawn]:
    """Those that there are numbers for."""
    for number, name in enumerate(["loss", *(name for name in results.names if _is_drawn(results, name))]):
        for x, label in (("tokens", "tokens"), ("seconds", "seconds of training steps")):
            what = f"{heading(name)} against {'tokens' if x == 'tokens' else 'time'}"
            yield _picture(f"{x}{number}", what, _courses(results, name, x, label))
    if any(choice.memory.get("measured_peak_bytes") for choice in results.choices):
        what = f"{heading(results.goal.name)} against peak memory"
        yield _picture("tradeoff", what, lambda axes: _draw_tradeoff(axes, results))
    if any(len(choice.swept) > 1 for choice in results.choices):
        what = f"{heading(results.goal.name)} against learning rate"
        yield _picture("rates", what, lambda axes: _draw_rates(axes, results))


def _picture(name: str, what: str, draw: Callable[[Axes], None]) -> Drawn:
    return Drawn(what, drawn(f"compare-{name}", what, draw))


def title(name: str) -> str:
    """A number of a run in words."""
    return TITLES.get(name, name.removeprefix(EVAL))


def heading(name: str) -> str:
    """The same at the beginning of a line."""
    return title(name)[:1].upper() + title(name)[1:]


def _is_drawn(results: Results, name: str) -> bool:
    """Whether there was more than one evaluation, and no loss beside it that says the same."""
    stem, _, last = name.rpartition("/")
    if last == "perplexity" and f"{stem}/loss" in results.names:
        return False
    return any(len(one.curve(name).values) > 1 for choice in results.choices for one in choice.best.done)


# -- over the run -------------------------------------------------------------------------------------------


class Course(NamedTuple):
    """The mean of a number over the seeds of a pair [N], its standard deviation [N], and where along the run."""

    x: Floats
    mean: Floats
    std: Floats  # zero with one seed

    @classmethod
    def of(cls, rated: Rated, name: str, x: str) -> Course:
        """At the steps that all seeds have."""
        curves = [curve for one in rated.done if len((curve := one.curve(name)).values)]
        steps = curves[0].steps if curves else np.empty(0)
        for curve in curves[1:]:
            steps = np.intersect1d(steps, curve.steps)
        kept = [np.searchsorted(curve.steps, steps) for curve in curves]
        if not curves:
            return cls(steps, steps, steps)
        values = np.stack([curve.values[at] for curve, at in zip(curves, kept, strict=True)])
        places = np.stack([getattr(curve, x)[at] for curve, at in zip(curves, kept, strict=True)])
        spread = values.std(axis=0, ddof=1) if len(curves) > 1 else np.zeros(len(steps))
        return cls(places.mean(axis=0), values.mean(axis=0), spread)


def _courses(results: Results, name: str, x: str, label: str) -> Callable[[Axes], None]:
    styles = looks(results)
    courses = [(styles[choice.pair], Course.of(choice.best, name, x)) for choice in results.choices]
    courses = [(look, course) for look, course in courses if np.isfinite(course.mean).any()]

    def draw(axes: Axes) -> None:
        for look, course in reversed(courses):  # the best on top
            _draw_course(axes, look, course, noisy=name == "loss")
        _scale(axes, [course for _, course in courses], loss=name.endswith("loss"))
        furnish(axes, label)

    return draw


def _draw_course(axes: Axes, look: Look, course: Course, *, noisy: bool) -> None:
    kept = thinned(course.mean)
    x, mean, std = course.x[kept], course.mean[kept], course.std[kept]
    smooth = smoothed(mean) if noisy else None
    if std.any():
        axes.fill_between(x, mean - std, mean + std, color=look.color, alpha=0.16, linewidth=0)
    elif smooth is not None:
        axes.plot(x, mean, linewidth=0.6, alpha=0.25, color=look.color)
    mark = look.mark if len(x) < 20 else ""
    line = mean if smooth is None else smooth
    axes.plot(x, line, color=look.color, linestyle=look.dash, linewidth=1.6, marker=mark, markersize=3.5)


def _scale(axes: Axes, courses: Sequence[Course], *, loss: bool) -> None:
    """Axes from the data; a run whose loss has left for the sky does not press the others to the ground."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_formatter(lambda value, _: short_count(value) if value == int(value) else short(value))
    axes.yaxis.set_major_formatter(lambda value, _: short(value))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    begin = [float(course.mean[0]) for course in courses if math.isfinite(course.mean[0])]
    if loss and begin:
        highest = max(float(np.nanmax(course.mean + course.std)) for course in courses)
        lowest = min(float(np.nanmin(course.mean - course.std)) for course in courses)
        top = min(highest, ROOM * max(begin))
        axes.set_ylim(lowest - 0.05 * (top - lowest or 1), top + 0.05 * (top - lowest or 1))


# -- at the end of the run ----------------------------------------------------------------------------------


def _draw_point(axes: Axes, look: Look, x: float, rated: Rated, name: str, **options: Any) -> None:
    spread = rated.spread(name)
    if spread is None:
        return
    errors = None if spread.std is None else [spread.std]
    style: dict[str, Any] = {"color": look.color, "marker": look.mark, "markersize": 6, "linestyle": "", "capsize": 3}
    axes.errorbar([x], [spread.mean], yerr=errors, elinewidth=1.2, **(style | options))


def _draw_tradeoff(axes: Axes, results: Results) -> None:
    styles = looks(results)
    sizes = {choice: size for choice in results.choices if (size := choice.memory.get("measured_peak_bytes"))}
    unit, name = (2**30, "GiB") if max(sizes.values()) >= 2**30 else (2**20, "MiB")
    for choice, size in sizes.items():
        _draw_point(axes, styles[choice.pair], size / unit, choice.best, results.goal.name)
    _scale(axes, [], loss=False)
    axes.margins(0.08)
    furnish(axes, f"measured peak memory, {name}")


def _draw_rates(axes: Axes, results: Results) -> None:
    """Every rate of each pair; that which was chosen is filled."""
    from matplotlib.ticker import FixedLocator, NullLocator

    styles, name = looks(results), results.goal.name
    for choice in results.choices:
        look = styles[choice.pair]
        rated = sorted((one for one in choice.swept if one.spread(name)), key=lambda one: one.lr)
        means = [spread.mean for one in rated if (spread := one.spread(name))]
        axes.plot([one.lr for one in rated], means, color=look.color, linestyle=look.dash, linewidth=1.2, alpha=0.7)
        for one in rated:
            filled = {} if one is choice.best else {"markerfacecolor": "none"}
            _draw_point(axes, look, one.lr, one, name, **filled)
    axes.set_xscale("log")
    rates = sorted({one.lr for choice in results.choices for one in choice.swept})
    axes.xaxis.set_major_locator(FixedLocator(_apart(rates)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: short_lr(value))
    axes.yaxis.set_major_formatter(lambda value, _: short(value))
    furnish(axes, "learning rate (filled: chosen)")


def _apart(rates: Sequence[float], least: float = 0.55) -> list[float]:
    """Those that leave room for their labels, in units of e."""
    kept: list[float] = []
    for one in rates:
        if not kept or math.log(one / kept[-1]) >= least:
            kept.append(one)
    return kept
