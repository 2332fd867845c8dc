"""The curves of a run as SVG text that takes its colours from the page around it."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from collie_core.report import text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

# Drawn in these colours, which the finished SVG replaces by CSS variables: one picture for light and dark.
INK, MUTED, GRID = "#010101", "#020202", "#030303"
SERIES = tuple(f"#{number:02d}{number:02d}{number:02d}" for number in range(4, 12))
FIRST, SECOND = SERIES[:2]
VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)"}
VARIABLES |= {color: f"var(--series-{number})" for number, color in enumerate(SERIES, start=1)}

WIDTH, HEIGHT = 4.6, 2.6  # inches of 72 px: as wide as a phone, where text then has its own size
FONT = 10.5  # px
BUCKETS = 400  # a curve keeps at most twice as many points

# What has its place in a chart already, or would say the same. Other names are results, monitors, and what plugins add.
KNOWN = frozenset(
    (
        *("step", "epoch", "tokens", "loss", "eval/loss", "learning_rate", "grad_norm", "peak_memory_bytes"),
        *("tokens_per_second", "tokens_per_second_per_device", "step_time_s"),
    )
)

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Series:
    """One curve: values [N] at steps [N]; NaN leaves a gap."""

    label: str
    steps: NDArray[np.float64]
    values: NDArray[np.float64]
    color: str = FIRST
    noisy: bool = False  # a moving mean is drawn over it


@dataclass(frozen=True)
class Chart:
    """A titled picture of one or more curves. `tick` writes the numbers of the vertical axis."""

    name: str  # unique on the page: the ids inside the SVG begin with it
    title: str
    series: Sequence[Series]
    tick: Callable[[float], str]
    from_zero: bool = False


def charts(rows: Sequence[Row]) -> list[Chart]:
    """The charts that the rows of metrics.jsonl have numbers for."""
    train, held_out = series(rows, "loss", "train", noisy=True), series(rows, "eval/loss", "eval", SECOND)
    speed, memory = (
        series(rows, "tokens_per_second", noisy=True),
        series(rows, "peak_memory_bytes", unit=2**30),
    )
    norm = series(rows, "grad_norm", noisy=True)
    candidates = [
        Chart("loss", "Loss (nats per target token)", [train, held_out], short),
        Chart("lr", "Learning rate", [series(rows, "learning_rate")], short_lr),
        Chart("speed", "Tokens per second", [speed], short_count, from_zero=True),
        Chart("memory", "Peak memory (GiB)", [memory], short, from_zero=True),
        Chart("norm", "Gradient norm before clipping", [norm], short, from_zero=True),
    ]
    names = {name for row in rows for name, value in row.items() if isinstance(value, int | float)} - KNOWN
    for number, name in enumerate(sorted(names, key=lambda name: (not name.startswith("eval/"), name))):
        is_result = name.startswith("eval/")
        curve = series(rows, name, color=SECOND if is_result else FIRST, noisy=not is_result)
        title = name.removeprefix("eval/").capitalize() if is_result else name
        candidates.append(Chart(f"other{number}", title, [curve], short if is_result else _any_size))
    return [chart for chart in candidates if any(np.isfinite(one.values).any() for one in chart.series)]


def series(
    rows: Sequence[Row],
    name: str,
    label: str = "",
    color: str = FIRST,
    *,
    noisy: bool = False,
    unit: float = 1,
) -> Series:
    """The curve of one number in `unit`s, thinned out; rows without it are left out, nulls leave gaps."""
    points = [(row["step"], row[name]) for row in rows if name in row and "step" in row]
    steps = np.array([step for step, _ in points], dtype=np.float64)
    values = np.array([_number(value) for _, value in points], dtype=np.float64) / unit
    kept = thinned(values)
    return Series(label, steps[kept], values[kept], color, noisy)


def thinned(values: NDArray[np.float64], buckets: int = BUCKETS) -> NDArray[np.intp]:
    """Indices of at most 2 x `buckets` points: least and greatest of each bucket, so that spikes stay."""
    if len(values) <= 2 * buckets:
        return np.arange(len(values))
    kept: set[int] = set()
    for bucket in np.array_split(np.arange(len(values)), buckets):
        finite = bucket[np.isfinite(values[bucket])]
        if len(finite) == 0:
            kept.add(int(bucket[0]))  # all NaN: one of them keeps the gap
        else:
            kept |= {int(finite[values[finite].argmin()]), int(finite[values[finite].argmax()])}
    return np.array(sorted(kept), dtype=np.intp)


def to_svg(chart: Chart) -> str:
    """The chart as one `<svg>` element."""
    return drawn(chart.name, chart.title, lambda axes: _draw(axes, chart))


def drawn(name: str, title: str, draw: Callable[[Axes], None]) -> str:
    """What `draw` draws as one `<svg>` element without fonts, scripts or anything outside of it.

    Args:
        name: unique on the page.
        title: for those who cannot see it.
        draw: with the colours of `VARIABLES`.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # Text stays text, so that the page's font and colour apply; a fixed salt gives equal runs equal files.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "collie"}):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return _inline(buffer.getvalue(), name, title)


def _draw(axes: Axes, chart: Chart) -> None:
    from matplotlib.ticker import MaxNLocator

    for one in chart.series:
        _draw_series(axes, one)
    axes.yaxis.set_major_formatter(lambda value, _: chart.tick(value))
    axes.xaxis.set_major_formatter(lambda value, _: short_count(value))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    last = max(one.steps[-1] for one in chart.series if len(one.steps))
    axes.set_xlim(-0.02 * last, max(1, 1.02 * last))
    if chart.from_zero:
        axes.set_ylim(0, 1.08 * max(np.nanmax(one.values) for one in chart.series) or 1)
    furnish(axes, "step")
    if sum(len(one.values) > 0 for one in chart.series) > 1:
        axes.legend(frameon=False, fontsize=FONT, labelcolor=INK)


def furnish(axes: Axes, x_label: str) -> None:
    """Labels and grid as all charts have them."""
    axes.set_xlabel(x_label, color=MUTED, fontsize=FONT)
    axes.tick_params(which="both", colors=MUTED, labelsize=FONT, length=0)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_series(axes: Axes, one: Series) -> None:
    if len(one.values) == 0:
        return
    marker = "o" if np.isfinite(one.values).sum() < 20 else ""  # a single point has no line
    style: dict[str, Any] = {"color": one.color, "solid_capstyle": "round", "solid_joinstyle": "round"}
    smooth = smoothed(one.values) if one.noisy else None
    if smooth is None:
        axes.plot(one.steps, one.values, marker=marker, markersize=4, linewidth=1.8, label=one.label, **style)
        return
    axes.plot(one.steps, one.values, linewidth=0.8, alpha=0.35, **style)
    axes.plot(one.steps, smooth, linewidth=1.8, label=one.label, **style)


def smoothed(values: NDArray[np.float64], least: int = 60) -> NDArray[np.float64] | None:
    """A centred moving mean over a twentieth of the points; None when there are few of them, or gaps."""
    if len(values) < least or not np.isfinite(values).all():
        return None
    window = np.ones(len(values) // 20 | 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def _inline(svg: str, name: str, title: str) -> str:
    """`svg` as an element of a page: no prolog, no metadata, unique ids, colours by variable, size by CSS."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)  # the family is the page's
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, variable)
    head, body = svg.split(">", 1)
    view_box = re.search(r'viewBox="[^"]*"', head)
    assert view_box is not None
    body = re.sub(r' ?xlink:href="', ' href="', body)
    return f'<svg {view_box.group(0)} role="img" aria-label="{escape(title)}">{body}'


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")


def short(value: float) -> str:
    return f"{value:.4g}"


def short_count(value: float) -> str:
    return text.count(value).replace(".0 ", " ")


def _any_size(value: float) -> str:
    return short(value) if abs(value) < 10_000 else short_count(value)


def short_lr(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}".replace("e-0", "e-").replace(".0e", "e")
