"""report.html, report.json and report.csv: everything that a comparison has found."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from collie_core.compare.folder import Folder, replacing, write_whole
from collie_core.compare.grid import CELLS, Refusal
from collie_core.compare.pictures import heading, legend, looks, pictures, title
from collie_core.compare.results import Choice, Results, Spread
from collie_core.report import text
from collie_core.report.html import STYLE, table, tile
from collie_core.report.rundir import REPORT

if TYPE_CHECKING:
    from collie_core.config.evaluation import Mode

TEMPLATE = Path(__file__).with_name("compare.html.template")
MEMORIES = ("predicted_peak_bytes", "measured_peak_bytes")
CELL_NUMBERS = ("steps", "tokens", "seconds", "tokens_per_second", "loss", "peak_memory_bytes")


def write_reports(folder: Folder, results: Results) -> None:
    """All three, each whole or not at all."""
    write_whole(folder.root / "report.json", as_object(results))
    for name, written in (("report.csv", as_csv(results)), (REPORT, as_html(folder, results))):
        with replacing(folder.root / name) as beside:
            beside.write_text(written, encoding="utf-8")


# -- for programs -------------------------------------------------------------------------------------------


def as_object(results: Results) -> dict[str, Any]:
    """What report.json holds."""
    return {
        "decided_by": results.goal._asdict(),
        "better": results.better,
        "ranking": [_choice(choice) for choice in results.choices],
        "cells": [_row(one, results) for one in results.found],
        "refused": [_refusal(refusal) for refusal in results.grid.refused],
        "config": results.grid.base.model_dump(mode="json"),
    }


def _choice(choice: Choice) -> dict[str, Any]:
    names = (*choice.best.names, *CELL_NUMBERS)
    return {
        **choice.pair._asdict(),
        "learning_rate": choice.best.lr,
        "at_edge_of_sweep": choice.at_edge,
        "learning_rates": [one.lr for one in choice.swept],
        "seeds": [one.cell.seed for one in choice.best.done],
        "numbers": {name: spread._asdict() for name in names if (spread := choice.best.spread(name))},
        **choice.memory,
    }


def _row(one: Any, results: Results) -> dict[str, Any]:
    cell = one.cell
    chosen = any((own.pair, own.best.lr) == (cell.pair, cell.lr) for own in results.choices)
    row: dict[str, Any] = {**cell.pair._asdict(), "learning_rate": cell.lr, "seed": cell.seed, "chosen": chosen}
    row |= {"status": one.status, "reason": one.reason, "run": f"{CELLS}/{cell.name}", "wall_seconds": one.seconds}
    row |= {name: _finite(one.numbers.get(name)) for name in (*CELL_NUMBERS, *results.names)}
    return row | {name: results.memory[cell.pair].get(name) for name in MEMORIES}


def _refusal(refusal: Refusal) -> dict[str, Any]:
    return {**refusal.pair._asdict(), "learning_rate": refusal.lr, "status": "refused", "reason": refusal.reason}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def as_csv(results: Results) -> str:
    """One line for each run; what is missing is empty. Refused ones have their reason and no numbers."""
    rows = [_row(one, results) for one in results.found]
    rows += [_refusal(refusal) | {"chosen": False} for refusal in results.grid.refused]
    written = io.StringIO()
    writer = csv.DictWriter(written, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return written.getvalue()


# -- for people ---------------------------------------------------------------------------------------------


def as_html(folder: Folder, results: Results) -> str:
    """One page that opens offline."""
    figures = (
        f"<figure><figcaption>{escape(one.title)}</figcaption>\n{one.svg}</figure>\n" for one in pictures(results)
    )
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        style=STYLE.read_text(encoding="utf-8"),
        title=escape(folder.root.resolve().name),
        outcome=escape(outcome(results)),
        tiles="".join(_tiles(results)),
        ranking=_ranking(results),
        notes="".join(f"<li>{escape(note)}</li>\n" for note in notes(results)),
        legend="".join(legend(results)),
        charts="".join(figures),
        without=_without(results),
        cells=_cells(results),
        config=escape(results.grid.base.to_yaml()),
    )


def outcome(results: Results) -> str:
    """How many runs ended in which way."""
    count = Counter(one.status for one in results.found)
    count["refused"] += len(results.grid.refused)
    return ", ".join(
        f"{count[status]} {status}" for status in ("done", "failed", "refused", "missing") if count[status]
    )


def _without(results: Results) -> str:
    rows = list(results.without_result)
    if not rows:
        return ""
    return f'<section class="why"><h2>Without a result</h2>\n{table(rows, head=("run", "", "why"))}</section>\n'


def _tiles(results: Results) -> Iterator[str]:
    """The winners: by what decides, by speed, by memory."""
    if not results.choices:
        return
    first = results.choices[0]
    decided = written(first.best.spread(results.goal.name), text.loss)
    yield tile(f"best {title(results.goal.name)}", f"{first.pair}: {decided}")
    fastest = max(results.choices, key=lambda choice: _mean(choice.best.spread("tokens_per_second")))
    yield tile("most tokens/s", f"{fastest.pair}: {written(fastest.best.spread('tokens_per_second'), text.count)}")
    held = [choice for choice in results.choices if choice.memory.get("measured_peak_bytes")]
    if held:
        least = min(held, key=lambda choice: int(choice.memory["measured_peak_bytes"]))
        yield tile("least memory", f"{least.pair}: {text.memory(least.memory['measured_peak_bytes'])}")
    tokens = {_mean(choice.best.spread("tokens")) for choice in results.choices}
    yield tile("tokens of each run", " to ".join(text.count(one) for one in sorted({min(tokens), max(tokens)})))


def _mean(spread: Spread | None) -> float:
    return -math.inf if spread is None else spread.mean


Write = Callable[[float], str]


def columns(results: Results) -> list[tuple[str, Write]]:
    """Of the ranking: the name of the number, and how it is written."""
    numbers: dict[str, Write] = dict.fromkeys([*results.names, "loss"], text.loss)
    numbers |= {"tokens_per_second": text.count, "seconds": text.duration}
    return list(numbers.items())


def written(spread: Spread | None, write: Write) -> str:
    """A mean, with its standard deviation where there is one, to the same place."""
    if spread is None:
        return text.NONE
    mean = write(spread.mean)
    if spread.std is None:
        return mean
    whole, _, places = mean.partition(".")
    return f"{mean} ± " + (f"{spread.std:.{len(places)}f}" if (whole + places).isdecimal() else write(spread.std))


def _ranking(results: Results) -> str:
    if not results.choices:
        return "<p>no run has come to an end</p>"
    styles = looks(results)
    numbers = [heading(name) for name, _ in columns(results)] + ["Peak predicted", "Peak measured", "Seeds"]
    lines = [_head(["", "", "Optimizer", "Adapter", "Learning rate"], numbers)]
    for place, choice in enumerate(results.choices, start=1):
        cells = [f"<td>{place}</td><td>{styles[choice.pair].swatch}</td>"]
        cells += [f"<td>{escape(word)}</td>" for word in (*choice.pair, _rate(choice))]
        cells += [_number(results, choice, name, write) for name, write in columns(results)]
        cells += [_memory(results, choice, name) for name in MEMORIES]
        cells.append(f'<td class="number">{len(choice.best.done)} of {len(choice.best.found)}</td>')
        lines.append(f"<tr>{''.join(cells)}</tr>\n")
    return f"<table>{''.join(lines)}</table>"


def _head(words: Sequence[str], numbers: Sequence[str]) -> str:
    cells = [f"<th>{escape(word)}</th>" for word in words]
    cells += [f'<th class="number">{escape(word)}</th>' for word in numbers]
    return f"<tr>{''.join(cells)}</tr>\n"


def _rate(choice: Choice) -> str:
    tried = len(choice.swept)
    return f"{choice.best.lr:g}" + (f" ({'edge ' * choice.at_edge}of {tried})" if tried > 1 else "")


def _number(results: Results, choice: Choice, name: str, write: Write) -> str:
    spread = choice.best.spread(name)
    beside = [_mean(own.best.spread(name)) for own in results.choices]
    return _bar(written(spread, write), _mean(spread), beside, results.better.get(name))


def _memory(results: Results, choice: Choice, name: str) -> str:
    sizes = [own.memory.get(name) or -math.inf for own in results.choices]
    return _bar(text.memory(choice.memory.get(name)), choice.memory.get(name) or -math.inf, sizes, "min")


def _bar(word: str, value: float, beside: Sequence[float], mode: Mode | None) -> str:
    """A number over a bar that begins at zero, of those of one column; bold where it is the best of them."""
    known = [one for one in beside if math.isfinite(one)]
    share = value / max(known) if value > 0 else 0
    best = {"min": min, "max": max}[mode](known) if mode is not None and len(set(known)) > 1 else None
    return f'<td class="number bar{" best" * (value == best)}" style="--share: {share:.3f}">{escape(word)}</td>'


def _cells(results: Results) -> str:
    """Every run, with a link to its own report."""
    numbers: dict[str, Write] = {results.goal.name: text.loss, "loss": text.loss, "tokens_per_second": text.count}
    numbers["peak_memory_bytes"] = text.memory
    lines = [_head(["Run", ""], ["Time in all", *map(heading, numbers)])]
    for one in results.found:
        run = escape(str(one.cell))
        link = f'<a href="{escape(f"{CELLS}/{one.cell.name}/{REPORT}")}">{run}</a>' if one.numbers else run
        words = [text.duration(one.seconds)]
        words += [write(one.numbers[name]) if name in one.numbers else text.NONE for name, write in numbers.items()]
        rest = "".join(f'<td class="number">{escape(word)}</td>' for word in words)
        lines.append(f"<tr><td>{link}</td><td>{escape(one.status)}</td>{rest}</tr>\n")
    return f"<table>{''.join(lines)}</table>"


def notes(results: Results) -> Iterator[str]:
    """How the numbers came about, as far as it is not the same for every comparison."""
    goal = title(results.goal.name)
    last = " of the last tenth of the steps" if results.goal.name == "loss" else " at the end"
    yield f"Ranked by {goal}{last}, {'less' if results.goal.mode == 'min' else 'more'} is better."
    yield "Bold is the best of a column, where it is known whether less or more is better."
    if any(len(choice.swept) > 1 for choice in results.choices):
        yield (
            f"Of several learning rates each pair has the one with the best {goal}, among those at which most seeds "
            "came to an end."
        )
    if edges := [str(choice.pair) for choice in results.choices if choice.at_edge]:
        yield f"At the edge of the sweep, where a rate beyond it may be better: {'; '.join(edges)}."
    seeds = max((len(choice.best.done) for choice in results.choices), default=0)
    if seeds > 1:
        yield "± and bands are one standard deviation over the seeds of a pair."
    else:
        yield "With one seed there is no telling which differences are chance; --seeds 1,2,3 gives error bars."
    yield (
        "Predicted and measured peaks are those of two steps on full rows, from when the model stands, on the rank "
        "that holds the most. The peak of the run is max_memory_allocated on a GPU, and on a CPU all that is resident, "
        "Python and its libraries too."
    )
    for reason in dict.fromkeys(
        f"{pair}: {reason}"
        for pair, memory in results.memory.items()
        for key, reason in memory.items()
        if key.endswith("_reason")
    ):
        yield f"No peak of {reason}"


# -- on a terminal ------------------------------------------------------------------------------------------


def as_text(results: Results) -> str:
    """The ranking, for a terminal."""
    told = (results.goal.name, "loss", "tokens_per_second")
    shown = [column for column in columns(results) if column[0] in told]
    rows = [["", "", "learning rate", *(title(name) for name, _ in shown), "peak predicted", "measured"]]
    for place, choice in enumerate(results.choices, start=1):
        numbers = [written(choice.best.spread(name), write) for name, write in shown]
        rows.append([f"{place}", f"{choice.pair}", _rate(choice), *numbers])
        rows[-1] += [text.memory(choice.memory.get(name)) for name in MEMORIES]
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    aligned = (
        [
            word.ljust(width) if at < 3 else word.rjust(width)
            for at, (word, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    )
    lines = ["  ".join(row).rstrip() for row in aligned] if results.choices else []
    lines += [f"{what}: {status}: {text.one_line(why, 300)}" for what, status, why in results.without_result]
    return "\n".join(lines)
