"""The page of a comparison in a browser."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from compared import asked, grid_of, rows_of, write_cell

from collie_core.compare.folder import Folder, write_whole
from collie_core.compare.grid import Grid, Pair, Refusal
from collie_core.compare.report import write_reports
from collie_core.compare.results import Results

ROOT = Path(__file__).resolve().parent.parent
SUPPORT = ROOT / "plugins" / "collie_server" / "tests" / "support"
sys.path.append(str(SUPPORT))

import chromium  # noqa: E402

EXECUTABLE = chromium.find()
pytestmark = pytest.mark.skipif(
    EXECUTABLE is None,
    reason="no Chromium is installed, and COLLIE_CHROMIUM names none; "
    f"`python {SUPPORT.relative_to(ROOT)}/chromium.py FOLDER` fetches one",
)
OPTIMIZERS = ("adamw", "lion", "adan", "sophia", "lomo", "adalomo")


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """Of six optimizers, two adapters, two rates and two seeds, some of which came to nothing."""
    folder = Folder(tmp_path / "six optimizers & two adapters")
    pairs = [Pair(optimizer, adapter) for optimizer in OPTIMIZERS for adapter in ("none", "lora")]
    grid = grid_of(Grid.of(asked(tmp_path)), pairs, [1e-4, 1e-3], [1, 2])
    (folder.root / "memory").mkdir(parents=True)
    for at, cell in enumerate(grid.cells):
        losses = [4 - (step / 60) ** 0.5 * (1 + at / 40) + (step * 7 + cell.seed * 3) % 5 / 20 for step in range(60)]
        broken = ["failed", f"NotANumber: {'the loss of a step is no number, ' * 8}"] if at % 11 == 9 else []
        write_cell(folder, cell, rows_of(losses, losses[::2]), *broken)
    for at, pair in enumerate(pairs):
        write_whole(folder.memory(pair), {f"{how}_peak_bytes": 2**22 + at * 2**18 for how in ("predicted", "measured")})
    grid = Grid(grid.base, (), grid.pairs, grid.cells, (Refusal(pairs[-1], 1e-5, "it is refused"),))
    write_reports(folder, Results.read(folder, grid))
    return folder.root / "report.html"


def look_at(page_file: Path) -> dict[str, Any]:
    """What a person sees who opens the file."""
    from playwright.sync_api import expect

    seen: dict[str, Any] = {"asked": set()}
    with chromium.opened(1180, 900) as (page, seen["complaints"]):
        page.on("request", lambda request: seen["asked"].add(request.url))
        page.goto(page_file.as_uri())
        expect(page.locator("h1")).to_have_text("six optimizers & two adapters")
        seen["ranked"] = page.locator(".wide").first.locator("tr").count() - 1
        seen["charts"] = [box for box in (chart.bounding_box() for chart in page.locator("figure svg").all()) if box]
        seen["legend"] = page.locator(".legend li").all_inner_texts()
        line = page.locator("figure svg path[style*='series-1']").first
        for scheme in ("dark", "light"):
            page.emulate_media(color_scheme=scheme)
            colours = [line.evaluate("one => getComputedStyle(one).stroke")]
            colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
            seen[scheme] = colours
            if folder := os.environ.get("COLLIE_SCREENSHOTS"):
                page.screenshot(path=f"{folder}/compare-{scheme}.png", full_page=True)
        page.get_by_text("All runs").click()
        expect(page.get_by_role("link").first).to_be_visible()
        seen["overflow"] = page.evaluate("document.documentElement.scrollWidth")
        page.set_viewport_size({"width": 360, "height": 640})
        seen["width"] = page.evaluate("document.documentElement.scrollWidth")
    return seen


def test_it_opens_offline_and_shows_everything(page: Path) -> None:
    pytest.importorskip("playwright")
    seen = look_at(page)
    assert seen["complaints"] == []
    assert seen["asked"] == {page.as_uri()}
    assert seen["ranked"] == 12
    assert len(seen["charts"]) == 6
    assert all(box["width"] > 250 and box["height"] > 120 for box in seen["charts"])
    assert len(seen["legend"]) == 12
    assert all(first != second for first, second in zip(seen["dark"], seen["light"], strict=True))
    assert seen["overflow"] <= 1180
    assert seen["width"] <= 360
