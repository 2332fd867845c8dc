"""The report of a comparison: for people, for programs, and for spreadsheets."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from compared import asked, grid_of, rows_of, write_cell
from pages import Page

from collie_core.compare.folder import Folder, write_whole
from collie_core.compare.grid import Cell, Grid, Pair, Refusal
from collie_core.compare.pictures import heading, title
from collie_core.compare.report import as_html, as_text, write_reports
from collie_core.compare.results import Results

ADAMW, LORA, LION = Pair("adamw", "none"), Pair("adamw", "lora"), Pair("lion", "none")
WHY = "the loss is <b>no</b> number & more"


def fill(folder: Folder) -> Results:
    """Two pairs at two rates from two seeds; one run failed and one pair is refused."""
    grid = grid_of(Grid.of(asked(folder.root.parent)), [ADAMW, LORA], [1e-4, 1e-3], [1, 2])
    grid = Grid(grid.base, (), (*grid.pairs, LION), grid.cells, (Refusal(LION, None, "lion is refused: <why>"),))
    (folder.root / "memory").mkdir(parents=True)
    for at, cell in enumerate(grid.cells):
        losses = [4.0, 3.0 + cell.seed / 10, 2.0 + at / 10]
        write_cell(folder, cell, rows_of(losses, losses), *(["failed", WHY] if at == 7 else []))
    write_whole(folder.memory(ADAMW), {"predicted_peak_bytes": 3 * 2**20, "measured_peak_bytes": 2**22})
    why = "it cannot be planned"
    write_whole(
        folder.memory(LORA),
        {"predicted_peak_bytes": None, "predicted_reason": why, "measured_peak_bytes": 2**21},
    )
    return Results.read(folder, grid)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Folder, Results]:
    folder = Folder(tmp_path_factory.mktemp("report") / "compared")
    results = fill(folder)
    write_reports(folder, results)
    return folder, results


def page_of(folder: Folder) -> tuple[str, Page]:
    html = (folder.root / "report.html").read_text(encoding="utf-8")
    return html, Page(html)


def test_the_page_opens_offline_in_both_colour_schemes(written: tuple[Folder, Results]) -> None:
    html, page = page_of(written[0])
    assert "http" not in html
    assert "<script" not in html
    assert "prefers-color-scheme: dark" in html
    inside = [reference[1:] for reference in page.references if reference.startswith("#")]
    outside = [reference for reference in page.references if not reference.startswith("#")]
    assert set(inside) <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert set(outside) == {f"cells/{one.cell.name}/report.html" for one in written[1].found if one.numbers}
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        assert not re.findall(r"(?:stroke|fill): #[0-9a-f]+", svg)  # every colour is a variable


def test_the_page_has_every_picture_with_a_legend(written: tuple[Folder, Results]) -> None:
    html, _ = page_of(written[0])
    assert re.findall(r"<figcaption>(.*?)</figcaption>", html) == [
        "Training loss against tokens",
        "Training loss against time",
        "Evaluation loss against tokens",
        "Evaluation loss against time",
        "Evaluation loss against peak memory",
        "Evaluation loss against learning rate",
    ]
    (legend,) = re.findall(r'<ul class="legend">(.*?)</ul>', html)
    assert re.findall(r"</svg>(.*?)</li>", legend) == ["adamw", "adamw, lora"]
    assert "stroke-dasharray" in legend


def test_the_page_says_what_was_found_and_how(written: tuple[Folder, Results]) -> None:
    _, page = page_of(written[0])
    said = " ".join(" ".join(page.texts).split())
    for expected in (
        "comparison: 7 done, 1 failed, 1 refused",
        "2.050 ± 0.071",
        "0.0001 (edge of 2)",
        "Ranked by evaluation loss at the end, less is better.",
        "one standard deviation over the seeds",
        "No peak of adamw, lora: it cannot be planned",
        "lion is refused: <why>",
        WHY,
        "3 MiB",
        "2 of 2",
    ):
        assert expected in said, expected
    assert "b" not in page.tags
    assert "why" not in page.tags


def test_json_has_the_ranking_and_every_cell(written: tuple[Folder, Results]) -> None:
    found: dict[str, Any] = json.loads((written[0].root / "report.json").read_text())
    assert found["decided_by"] == {"name": "eval/loss", "mode": "min"}
    first, second = found["ranking"]
    assert (first["optimizer"], first["adapter"], first["learning_rate"]) == ("adamw", "none", 1e-4)
    assert first["numbers"]["eval/loss"] == {
        "mean": pytest.approx(2.05),
        "std": pytest.approx(0.05 * 2**0.5),
        "n": 2,
    }
    assert (first["predicted_peak_bytes"], first["measured_peak_bytes"]) == (3 * 2**20, 2**22)
    assert (second["predicted_peak_bytes"], second["predicted_reason"]) == (None, "it cannot be planned")
    assert [cell["status"] for cell in found["cells"]] == ["done"] * 7 + ["failed"]
    assert [cell["chosen"] for cell in found["cells"]] == [True, True, False, False] * 2
    assert found["refused"] == [
        {
            "optimizer": "lion",
            "adapter": "none",
            "learning_rate": None,
            "status": "refused",
            "reason": "lion is refused: <why>",
        }
    ]


def test_numbers_are_the_same_everywhere_and_bytes_are_whole(written: tuple[Folder, Results]) -> None:
    folder, _ = written
    found = json.loads((folder.root / "report.json").read_text())
    with (folder.root / "report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for cell, row in zip(found["cells"], rows, strict=False):
        assert {name: "" if value is None else str(value) for name, value in cell.items()} == row
    assert isinstance(found["cells"][0]["peak_memory_bytes"], int)
    assert rows[4]["measured_peak_bytes"] == rows[7]["measured_peak_bytes"] == str(2**21)  # the last one failed
    said = " ".join(page_of(folder)[1].texts)
    for choice in found["ranking"]:
        spread = choice["numbers"]["eval/loss"]
        assert f"{spread['mean']:.3f} ± {spread['std']:.3f}" in said


def test_the_best_of_a_column_is_marked_where_it_is_known(written: tuple[Folder, Results]) -> None:
    html, _ = page_of(written[0])
    best = re.findall(r'<td class="number bar best"[^>]*>(.*?)</td>', html)
    assert best == [
        "2.050 ± 0.071",
        "2.050 ± 0.071",
        "2 MiB",
    ]  # speed and time are the same, one is predicted
    assert json.loads((written[0].root / "report.json").read_text())["better"]["eval/loss"] == "min"


def test_names_of_metrics_keep_their_letters() -> None:
    assert title("eval/generation/rougeL") == "generation/rougeL"
    assert (heading("eval/generation/rougeL"), heading("eval/loss")) == ("Generation/rougeL", "Evaluation loss")


def test_csv_has_a_line_for_each_run(written: tuple[Folder, Results]) -> None:
    with (written[0].root / "report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["done"] * 7 + ["failed", "refused"]
    assert rows[0]["eval/loss"] == "2.0"
    assert (rows[0]["learning_rate"], rows[0]["seed"], rows[0]["chosen"]) == ("0.0001", "1", "True")
    assert rows[7]["reason"] == WHY
    assert rows[7]["eval/loss"] == ""
    assert rows[8]["optimizer"] == "lion"


def test_the_terminal_has_the_ranking_and_what_is_missing(written: tuple[Folder, Results]) -> None:
    lines = as_text(written[1]).splitlines()
    assert lines[1].split()[:3] == ["1", "adamw", "0.0001"]
    assert lines[2].startswith("2  adamw, lora")
    assert lines[3] == "lion: refused: lion is refused: <why>"
    assert lines[4] == f"adamw, lora, lr 0.001, seed 2: failed: {WHY}"


def test_a_run_that_diverges_does_not_press_the_others_to_the_ground(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "compared")
    grid = grid_of(Grid.of(asked(tmp_path)), [ADAMW, LION])
    for cell, loss in zip(grid.cells, (1.0, 1e6), strict=True):
        write_cell(folder, cell, rows_of([4.0, loss]))
    svg = re.findall(r"<svg.*?</svg>", as_html(folder, Results.read(folder, grid)), re.DOTALL)
    picture = next(one for one in svg if "Training loss against tokens" in one)
    ticks = [float(text) for text in re.findall(r">(\d+(?:\.\d+)?)</text>", picture)]
    assert max(tick for tick in ticks if tick < 50) > 3
    assert max(ticks) < 1e5


@pytest.mark.parametrize("count", [0, 1])
def test_a_comparison_that_has_just_begun_has_a_page(tmp_path: Path, count: int) -> None:
    folder = Folder(tmp_path / "compared")
    grid = grid_of(Grid.of(asked(tmp_path)), [ADAMW, LORA])
    for cell in grid.cells[:count]:
        write_cell(folder, cell, rows_of([1.0]))
    html = as_html(folder, Results.read(folder, grid))
    assert f"{2 - count} missing" in html
    assert ("no run has come to an end" in html) == (count == 0)
    Page(html)


def test_names_are_escaped(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "<i>")
    grid = grid_of(Grid.of(asked(tmp_path)), [Pair("<i>evil", 'a"b')])
    (cell,) = grid.cells
    assert isinstance(cell, Cell)
    assert "/" not in cell.name.replace("<", "")
    rows = [row | {"eval/<i>": 1.0} for row in rows_of([2.0, 1.0], [2.0, 1.0])]
    write_cell(folder, cell, rows)
    assert "i" not in Page(as_html(folder, Results.read(folder, grid))).tags
