"""report.html: a run on one page that opens offline."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from collie_core.errors import RunError
from collie_core.hookspecs import Run
from collie_core.plugins import hookimpl
from collie_core.report import text
from collie_core.report.console import summary_rows
from collie_core.report.rundir import CONFIG, ENVIRONMENT, METRICS, PLUGINS, REPORT, SUMMARY, write_json

if TYPE_CHECKING:
    from collie_core.generate import SampleText

TEMPLATE = Path(__file__).with_name("report.html.template")
STYLE = Path(__file__).with_name("style.css")

logger = logging.getLogger("collie")


class HtmlReport:
    """Writes summary.json and report.html when a run ends, also one that ends by an error."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._answers: list[tuple[int, Sequence[SampleText]]] = []  # (step, samples): the first and the last

    @hookimpl
    def collie_run_start(self) -> None:
        """Start the clock."""
        self._started = time.monotonic()

    @hookimpl
    def collie_evaluated(self, run: Run, samples: Sequence[SampleText]) -> None:
        """Keep the first and the last answers to held-out prompts."""
        if samples:
            self._answers = [*self._answers[:1], (run.step, samples)]

    @hookimpl
    def collie_run_end(self, run: Run, error: BaseException | None) -> None:
        """Write both files. How a run ended is not hidden behind a disk that is full."""
        written = summary(run, error, time.monotonic() - self._started)
        written["answers"] = answers(self._answers)
        try:
            write_json(run.output_dir / SUMMARY, written)
            write_report(run.output_dir)
        except OSError as failed:
            logger.warning("%s has no report: %s", run.output_dir, failed.strerror)


def summary(run: Run, error: BaseException | None, seconds: float) -> dict[str, Any]:
    """What summary.json holds: how the run ended, its facts, and the same as sentences."""
    facts = {name: value for name, value in run.facts.items() if name not in ("sample", "data_notes")}
    return {
        "outcome": _outcome(run, error),
        "steps": run.step,
        "max_steps": run.max_steps,
        "seconds": round(seconds, 3),
        "facts": facts,
        "best": run.best,
        "text": [[name, sentence] for name, sentence in summary_rows(run)],
    }


def answers(kept: Sequence[tuple[int, Sequence[SampleText]]]) -> list[dict[str, str]]:
    """One row per held-out prompt: what was expected, and the first and last answer by step."""
    rows: list[dict[str, str]] = []
    for step, samples in kept:
        for index, sample in enumerate(samples):
            if index == len(rows):
                rows.append({"prompt": sample.prompt, "expected": sample.target})
            rows[index][f"step {step}"] = sample.prediction
    return rows


def _outcome(run: Run, error: BaseException | None) -> str:
    if error is not None:
        return f"ended early by {type(error).__name__}"
    return f"stopped early: {run.stop_reason}" if run.stop_reason else "finished"


def write_report(output_dir: Path) -> Path:
    """Write report.html from the files of a run directory; files that are missing leave their part out.

    Raises:
        RunError: a file in the folder is damaged.
    """
    rows = read_metrics(output_dir / METRICS)
    written = _read_json(output_dir / SUMMARY) or {}
    plugins = _read_json(output_dir / PLUGINS) or []
    environment = _read_json(output_dir / ENVIRONMENT) or {}
    config = output_dir / CONFIG
    page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        style=STYLE.read_text(encoding="utf-8"),
        title=escape(output_dir.resolve().name),
        outcome=escape(written.get("outcome", "not finished")),
        tiles="".join(_tiles(rows, written)),
        charts="".join(_figures(rows)),
        summary=table(written.get("text", [])),
        answers=_answers_section(written.get("answers", [])),
        plugins=table([_plugin_row(plugin) for plugin in plugins], head=("name", "kind", "from")),
        config=escape(config.read_text(encoding="utf-8") if config.exists() else ""),
        environment=table(_environment_rows(environment)),
    )
    path = output_dir / REPORT
    path.write_text(page, encoding="utf-8")
    return path


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that a killed run left unfinished is dropped.

    Raises:
        RunError: another line is not a JSON object.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")  # the last item is what follows the last line end
    rows = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise RunError(f"{path}:{number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise RunError(f"{path}:{number} is not a JSON object")
        rows.append(row)
    return rows


def _read_json(path: Path) -> Any:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path} is not JSON: {error}") from error


def _tiles(rows: Sequence[Mapping[str, Any]], written: Mapping[str, Any]) -> Iterator[str]:
    """The few numbers one looks for first."""
    last: dict[str, Any] = {}
    for row in rows:
        last.update(row)
    if "step" in last:
        yield tile("steps", f"{last['step']:,}")
    if "loss" in last:
        yield tile("last loss", text.loss(last["loss"]))
    for name, value in last.items():
        if name.startswith("eval/"):
            yield tile(name, text.loss(value))
    if best := written.get("best"):
        yield tile(f"best {best['metric']}, step {best['step']}", text.loss(best["value"]))
    if last.get("tokens") is not None:
        yield tile("tokens", text.count(last["tokens"]))
    if "seconds" in written:
        yield tile("time", text.duration(written["seconds"]))


def tile(name: str, value: str) -> str:
    """A number and what it is."""
    return f"<div class=tile><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>\n"


def _figures(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    from collie_core.report.charts import charts, to_svg  # matplotlib: half a second, only at the end

    for chart in charts(rows):
        yield f"<figure><figcaption>{escape(chart.title)}</figcaption>\n{to_svg(chart)}</figure>\n"


def table(rows: Iterable[Sequence[object]], head: Sequence[str] = ()) -> str:
    """Rows of text as a table."""
    body = "".join(_row(row, "td") for row in rows)
    return f"<table>{_row(head, 'th') if head and body else ''}{body}</table>" if body else "<p>none</p>"


def _row(cells: Sequence[object], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in cells) + "</tr>\n"


def _answers_section(rows: Sequence[Mapping[str, str]]) -> str:
    if not rows:
        return ""
    head = list(rows[0])
    samples = table([[row.get(name, "") for name in head] for row in rows], head)
    return f"<section class=answers><h2>Held-out samples</h2>\n{samples}</section>\n"


def _plugin_row(plugin: Mapping[str, str]) -> tuple[str, str, str]:
    return plugin["name"], plugin["kind"], f"{plugin['distribution']} {plugin['version']}"


def _environment_rows(environment: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    packages = environment.get("packages", {})
    versions = {"python": environment.get("python")} | {
        name: packages.get(name) for name in ("collie-core", "torch", "transformers", "deepspeed", "peft")
    }
    cpu, git = environment.get("cpu") or {}, environment.get("git")
    yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    yield "platform", environment.get("platform", "")
    memory = text.memory(cpu.get("memory_bytes"))
    yield "cpu", f"{cpu.get('model', '')} ({cpu.get('cores', '?')} cores, {memory})"
    for gpu in environment.get("gpus", ()):
        yield "gpu", f"{gpu['model']} ({text.memory(gpu['memory_bytes'])})"
    if git:
        yield "git", git["commit"] + (" with changes" if git["changed"] else "")
    yield "command", " ".join(environment.get("command", ()))
