"""report.html, read as a browser reads it."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from fake_runs import make_run, play
from pages import Page

from collie_core.errors import RunError
from collie_core.report.charts import charts, series, thinned, to_svg
from collie_core.report.html import HtmlReport, read_metrics, write_report
from collie_core.report.metrics import MetricsFile
from collie_core.report.rundir import write_json


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def step_row(step: int, **values: Any) -> dict[str, Any]:
    numbers = {"loss": 3 / step, "learning_rate": 1e-3, "tokens_per_second": 9e3, "peak_memory_bytes": 2**30}
    return {"step": step, **numbers, **values}


def read(path: Path) -> tuple[str, Page]:
    html = path.read_text(encoding="utf-8")
    return html, Page(html)


def test_a_run_leaves_a_page_that_opens_offline(tmp_path: Path) -> None:
    play([HtmlReport(), MetricsFile()], make_run(tmp_path))
    html, page = read(tmp_path / "report.html")
    assert page.tags.count("svg") == 6  # loss, learning rate, speed, memory, gradient norm, perplexity
    assert "http" not in html
    assert "<script" not in html
    assert page.references
    assert all(reference.startswith("#") for reference in page.references)
    assert {reference[1:] for reference in page.references} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_page_suits_phones_and_both_colour_schemes(tmp_path: Path) -> None:
    play([HtmlReport(), MetricsFile()], make_run(tmp_path))
    html, _ = read(tmp_path / "report.html")
    assert 'name="viewport" content="width=device-width' in html
    assert "prefers-color-scheme: dark" in html
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        assert not re.findall(r"(?:stroke|fill): #[0-9a-f]+", svg)  # every colour is a variable


def test_page_holds_summary_config_plugins_and_answers(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {a: b}\n")
    row = {
        "kind": "model",
        "name": "llama",
        "distribution": "collie-llama",
        "version": "0.1.0",
        "value": "x:y",
    }
    write_json(tmp_path / "plugins.json", [row])
    play([HtmlReport(), MetricsFile()], make_run(tmp_path))
    _, page = read(tmp_path / "report.html")
    for expected in ("finished", "collie-llama 0.1.0", "model: {a: b}\n", "c-a-t", "c-a\nr", "step 3"):
        assert expected in page.texts
    assert any("1.06 M parameters" in text for text in page.texts)


def test_all_text_is_escaped(tmp_path: Path) -> None:
    evil = "</pre><script>alert('x')</script>&amp;$title"
    folder = tmp_path / "<i>run<i>"
    folder.mkdir()
    (folder / "config.yaml").write_text(evil)
    row = dict.fromkeys(("kind", "name", "distribution", "version", "value"), evil)
    write_json(folder / "plugins.json", [row])
    cpu = {"model": evil, "cores": 1, "memory_bytes": 1}
    write_json(folder / "environment.json", {"command": [evil], "platform": evil, "cpu": cpu})
    answers = [{"prompt": evil, "expected": evil, "step 1": evil}]
    write_json(folder / "summary.json", {"outcome": evil, "text": [[evil, evil]], "answers": answers})
    write_rows(folder, [step_row(1, **{f"eval/{evil}": 1.0})])
    html, page = read(write_report(folder))
    assert "<script" not in html
    assert "script" not in page.tags
    assert "i" not in page.tags
    assert evil in page.texts


def test_the_best_evaluation_has_its_place(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.best = {"step": 2, "epoch": 1.0, "metric": "eval/loss", "value": 1.25}
    play([HtmlReport(), MetricsFile()], run)
    assert json.loads((tmp_path / "summary.json").read_text())["best"] == run.best
    _, page = read(tmp_path / "report.html")
    assert page.texts[page.texts.index("best eval/loss, step 2") + 1] == "1.250"


def test_results_monitors_and_numbers_of_plugins_have_curves() -> None:
    rows = [
        {"step": step, "loss": 1.0, "tokens_per_second_per_device": 5.0, "host/cpu_percent": 50.0 * step, "smooth": 2.0}
        | {"eval/chat/rouge1": 0.5, "eval/loss": 1.0}
        for step in (1, 2)
    ]
    found = charts(rows)
    assert [chart.title for chart in found] == [
        "Loss (nats per target token)",
        "Chat/rouge1",
        "host/cpu_percent",
        "smooth",
    ]
    assert len({chart.name for chart in found}) == len(found)
    assert found[2].tick(2_500_000.0) == "2.50 M"
    assert found[2].tick(0.25) == "0.25"


def test_it_can_be_rebuilt_from_the_files(tmp_path: Path) -> None:
    play([HtmlReport(), MetricsFile()], make_run(tmp_path))
    first = (tmp_path / "report.html").read_bytes()
    (tmp_path / "report.html").unlink()
    assert write_report(tmp_path) == tmp_path / "report.html"
    assert (tmp_path / "report.html").read_bytes() == first


@pytest.mark.parametrize("rows", [[], [{"step": 1, "loss": None}], [step_row(1)], [{"step": 0, "eval/loss": 2.0}]])
def test_short_runs_have_a_page(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    write_rows(tmp_path, rows)
    _, page = read(write_report(tmp_path))
    assert "not finished" in page.texts


def test_an_empty_folder_has_a_page(tmp_path: Path) -> None:
    read(write_report(tmp_path))


def test_hundred_thousand_steps_make_a_small_page(tmp_path: Path) -> None:
    rows = [step_row(step, loss=1 + math.sin(step / 500) / 9) for step in range(1, 100_001)]
    rows[70_000]["loss"] = 50.0
    write_rows(tmp_path, rows)
    html, _ = read(write_report(tmp_path))
    assert len(html) < 400_000
    assert 50.0 in charts(rows)[0].series[0].values  # the spike stays


def test_nulls_leave_gaps() -> None:
    rows = [step_row(step, loss=None if 40 <= step < 60 else 1.0) for step in range(1, 101)]
    curve = series(rows, "loss")
    assert np.isnan(curve.values[39:59]).all()
    svg = to_svg(charts(rows)[0])
    line = max(re.findall(r'd="(M[^"]*)"', svg), key=len)
    assert line.count("M") == 2


@pytest.mark.parametrize("size", [1, 10, 800, 801, 12_345])
def test_thinning_keeps_extremes_order_and_a_bound(size: int) -> None:
    values = np.random.default_rng(0).normal(size=size)
    kept = thinned(values, buckets=400)
    assert len(kept) <= 800
    assert (np.diff(kept) > 0).all()
    assert {values.argmin(), values.argmax()} <= set(kept.tolist())


def test_thinning_keeps_gaps() -> None:
    values = np.ones(10_000)
    values[2000:4000] = np.nan
    assert np.isnan(values[thinned(values)]).any()


def test_drawing_leaves_matplotlib_as_it_was() -> None:
    before = dict(mpl.rcParams)
    for chart in charts([step_row(1), step_row(2)]):
        to_svg(chart)
    assert dict(mpl.rcParams) == before


def test_drawing_needs_no_pyplot() -> None:
    code = (
        "import sys; from collie_core.report.charts import charts, to_svg; "
        "to_svg(charts([{'step': 1, 'loss': 1.0}])[0]); sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_unfinished_last_line_of_a_killed_run_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]


@pytest.mark.parametrize("line", ["{", "[1]", "nonsense"])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl:2 "):
        read_metrics(tmp_path / "metrics.jsonl")


def test_a_run_that_fails_still_has_a_page(tmp_path: Path) -> None:
    play([HtmlReport(), MetricsFile()], make_run(tmp_path), error=KeyboardInterrupt())
    _, page = read(tmp_path / "report.html")
    assert "ended early by KeyboardInterrupt" in page.texts


def test_a_full_disk_does_not_hide_how_the_run_ended(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = make_run(tmp_path / "gone")
    HtmlReport().collie_run_end(run, error=RuntimeError("the real cause"))
    HtmlReport().collie_run_end(run, error=None)
    assert caplog.text.count("gone has no report: No such file or directory") == 2
