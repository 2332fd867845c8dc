"""What a person sees in the terminal while a model trains."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from collie_core.best import improves
from collie_core.hookspecs import Run
from collie_core.plugins import hookimpl
from collie_core.report import text
from collie_core.report.rundir import BEST, CONFIG, METRICS, REPORT

if TYPE_CHECKING:
    from collie_core.config.evaluation import Mode
    from collie_core.generate import SampleText

TARGET_STYLE = "bold green"
TARGET_MARKS = ("«", "»")  # where there is no colour


class ConsoleReporter:
    """A summary before the first step, live progress, evaluation results, and at the end what to type next.

    In a terminal a live display that costs four refreshes a second; elsewhere one line per logged step.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self._progress: Progress | None = None  # live between run start and run end, in a terminal
        self._clock = Clock()
        self._row: Mapping[str, Any] = {}  # the last logged step
        self._results: Mapping[str, float] = {}  # of the last evaluation
        self._best: dict[str, float] = {}  # so far, of results whose better direction is known
        self._saved: Path | None = None  # the last exported model
        self._prompt = ""  # a held-out one, for the command to type at the end

    @hookimpl
    def collie_run_start(self, run: Run) -> None:
        """Show what is about to run and one sample as the model sees it, then start the display."""
        self._show_summary(run)
        self._show_sample(run.facts.get("sample") or [])
        self._clock = Clock(run.step)
        if self.console.is_terminal:
            self._progress = self._make_progress()
            self._progress.add_task("train", total=run.max_steps, completed=run.step, numbers="")
            self._progress.start()

    @hookimpl
    def collie_after_step(self, run: Run) -> None:
        """Move the bar."""
        self._update(run)

    @hookimpl
    def collie_metrics(self, run: Run, values: Mapping[str, Any]) -> None:
        """Show the numbers of a logged step."""
        self._row = values
        if self._progress is None:
            self._line(f"step {run.step}/{run.max_steps}  {self._numbers(run)}")
        else:
            self._update(run)

    @hookimpl
    def collie_evaluated(self, run: Run, results: Mapping[str, float], samples: Sequence[SampleText]) -> None:
        """Show the results of an evaluation and what the model answered."""
        heading = Text(f"step {run.step}/{run.max_steps}  eval", style="bold")
        self._line(Text("\n").join([heading, *self._result_lines(run, results)]))
        self._results = {**self._results, **results}
        for sample in samples:
            self._show_answer(sample)
        if samples:
            self._prompt = samples[0].prompt

    @hookimpl
    def collie_checkpoint_saved(self, path: Path) -> None:
        """Remember where the model went."""
        self._saved = path

    @hookimpl
    def collie_run_end(self, run: Run, error: BaseException | None) -> None:
        """Close the display and say where everything lies."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if error is None:
            self._show_end(run)
        else:
            self._line(
                f"The run ended early, after step {run.step} of {run.max_steps}: {type(error).__name__}. "
                f"What it recorded lies in {run.output_dir}"
            )

    # -- before the first step -----------------------------------------------------------------------------

    def _show_summary(self, run: Run) -> None:
        rows = list(summary_rows(run))
        if not self.console.is_terminal:
            width = max(len(name) for name, _ in rows)
            self._line(f"CoLLiE  {run.output_dir}")
            for name, value in rows:
                self._line(f"  {name:<{width}}  {value}")
            return
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, value in rows:
            grid.add_row(name, Text(value))
        self.console.print(_panel(grid, f"CoLLiE  {run.output_dir}"))

    def _show_sample(self, segments: text.Segments) -> None:
        if not segments:
            return
        coloured = self.console.is_terminal and self.console.color_system is not None
        sample = Text()
        for piece, is_target in text.shortened(segments):
            marked = f"{TARGET_MARKS[0]}{piece}{TARGET_MARKS[1]}" if is_target and not coloured else piece
            sample.append(marked, style=TARGET_STYLE if is_target else "")
        if self.console.is_terminal:
            how = "in green" if coloured else f"in {''.join(TARGET_MARKS)}"
            self.console.print(_panel(sample, f"One sample, what the model learns {how}"))
        else:
            self._line(f"One sample, what the model learns in {''.join(TARGET_MARKS)}:")
            for line in sample.plain.splitlines():
                self._line(f"  {line}")

    # -- while it runs -------------------------------------------------------------------------------------

    def _make_progress(self) -> Progress:
        return Progress(
            TextColumn("{task.completed}/{task.total}", style="bold"),
            BarColumn(bar_width=10 if self.console.width < 90 else 20),
            TextColumn("{task.fields[numbers]}", markup=False),
            console=self.console,
            refresh_per_second=4,
        )

    def _update(self, run: Run) -> None:
        if self._progress is None:
            return
        (task,) = self._progress.task_ids
        self._progress.update(task, completed=run.step, numbers=self._numbers(run))

    def _result_lines(self, run: Run, results: Mapping[str, float]) -> Iterator[Text]:
        """One line for each result: name, value, change since the evaluation before, a mark at the best so far."""
        directions = _directions(run)
        names = [name.removeprefix("eval/") for name in results]
        width, digits = max(map(len, names), default=0), max(map(len, map(text.loss, results.values())), default=0)
        for short, (name, value) in zip(names, results.items(), strict=True):
            line = Text(f"  {short:<{width}}  ").append(f"{text.loss(value):>{digits}}", style="bold")
            line.append(f"  {text.change(value, self._results.get(name)):>8}", style="dim")
            if name in directions and improves(value, self._best.get(name), directions[name]):
                line.append("  best so far" if name in self._best else "", style="green")
                self._best[name] = value
            line.rstrip()
            yield line

    def _show_answer(self, sample: SampleText) -> None:
        prompt, target, answer = (text.one_line(part, 200) for part in sample)
        right = target == answer
        line = Text("  ").append(f"{prompt} → ", style="dim")
        line.append(answer, style="green" if right else "yellow")
        self._line(line if right else line.append(f"  (expected: {target})", style="dim"))

    def _numbers(self, run: Run) -> str:
        row = self._row
        parts = []
        if "loss" in row:
            parts.append(f"loss {text.loss(row['loss'])}")
        if "learning_rate" in row:
            parts.append(f"lr {text.learning_rate(row['learning_rate'])}")
        if "tokens_per_second" in row:
            parts.append(f"{text.rate(row['tokens_per_second'])} tok/s")
        if "peak_memory_bytes" in row:
            parts.append(text.memory(row["peak_memory_bytes"]))
        left = self._clock.left(run)
        if left is not None:
            parts.append(f"eta {text.duration(left)}")
        return "  ".join(parts)

    # -- at the end ----------------------------------------------------------------------------------------

    def _show_end(self, run: Run) -> None:
        took = text.duration(self._clock.elapsed())
        stopped = f" It was stopped early: {run.stop_reason}." if run.stop_reason else ""
        self._line(f"Done: {run.step} steps in {took}{self._final_numbers()}.{stopped}")
        for name, value in end_rows(run, self._saved, self._prompt):  # no box: commands are copied from here
            self._line(Text("  ").append(f"{name:<8}  ", style="dim").append(value, style="bold"))

    def _final_numbers(self) -> str:
        parts = [f"loss {text.loss(self._row['loss'])}"] if "loss" in self._row else []
        if self._results:
            parts.append(f"eval {text.results(self._results)}")
        return "".join(f", {part}" for part in parts)

    def _line(self, line: str | Text) -> None:
        """Lines, never wrapped and never read as markup."""
        self.console.print(line, soft_wrap=True, highlight=False, markup=False)


class Clock:
    """Wall-clock time of a run, and how long the rest takes at the mean pace so far, evaluations included."""

    def __init__(self, first_step: int = 0) -> None:
        self._first_step = first_step
        self._started = time.monotonic()

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    def left(self, run: Run) -> float | None:
        """Seconds to the last step; None before the first one is done."""
        done = run.step - self._first_step
        return self.elapsed() / done * (run.max_steps - run.step) if done > 0 else None


def _directions(run: Run) -> dict[str, Mode]:
    """Of the results that are known to be better when they are less or more; `evaluation.best` has the last word."""
    section = run.config.evaluation.best
    known: dict[str, Mode] = run.facts.get("better", {})
    return known if section is None or section.mode is None else known | {section.metric: section.mode}


def summary_rows(run: Run) -> Iterator[tuple[str, str]]:
    """What is about to run, as (name, sentence); what `run.facts` does not know is left out."""
    facts = run.facts
    if "model" in facts:
        yield "model", f"{facts['model']}{_parameters(facts)}"
    if "train_samples" in facts:
        yield "data", _data(facts)
    yield from (("", note) for note in facts.get("data_notes", ()))
    if "global_batch_size" in facts:
        yield "batch", _batch(facts)
    yield "steps", f"{run.max_steps:,}" + (f", {_epochs(facts['epochs'])}" if "epochs" in facts else "")
    if "optimizer" in facts:
        yield "optimizer", str(facts["optimizer"])
    running = [str(facts[name]) for name in ("precision", "device", "engine") if name in facts]
    if running:
        yield "runs in", ", ".join(running)
    if "memory" in facts:
        yield "memory", str(facts["memory"])
    if "server" in facts:
        yield "server", str(facts["server"])
    if facts.get("plugins"):
        yield "plugins", ", ".join(facts["plugins"])


def _parameters(facts: Mapping[str, Any]) -> str:
    if "parameters" not in facts:
        return ""
    total, trainable = facts["parameters"], facts.get("trainable_parameters", facts["parameters"])
    if trainable == total:
        return f", {text.count(total)} parameters, all trained"
    share = 100 * trainable / max(1, total)
    return f", {text.count(total)} parameters, {text.count(trainable)} trained ({share:.3g} %)"


def _data(facts: Mapping[str, Any]) -> str:
    line = f"{text.count(facts['train_samples'])} samples"
    if "train_tokens" in facts:
        line += f", {text.count(facts['train_tokens'])} tokens"
    if facts.get("eval_samples"):
        line += f"; {text.count(facts['eval_samples'])} samples to evaluate on"
    return line


def _batch(facts: Mapping[str, Any]) -> str:
    line = f"{facts['global_batch_size']:,} samples per step"
    if "per_device_train_batch_size" not in facts:
        return line
    return (
        f"{line} = {facts['per_device_train_batch_size']} per device x "
        f"{facts.get('gradient_accumulation_steps', 1)} accumulated x "
        f"{facts.get('data_parallel_size', 1)} data-parallel"
    )


def _epochs(value: float) -> str:
    return f"{value:.3g} epoch" + ("" if value == 1 else "s")


def end_rows(run: Run, saved: Path | None, prompt: str = "") -> Iterator[tuple[str, str]]:
    """Where everything lies and what to type next."""
    if run.best:
        yield "best", f"{run.output_dir / BEST} ({text.best(run.best)})"
    if saved is not None:
        model = shlex.quote(str(saved))
        typed = shlex.quote(prompt) if prompt.isprintable() and 0 < len(prompt) <= 80 else '"..."'
        yield "try it", f"collie generate {typed} --model {model}"
        if run.facts.get("eval_samples"):
            yield "evaluate", f"collie eval {shlex.quote(str(run.output_dir / CONFIG))} --model {model}"
    yield "report", str(run.output_dir / REPORT)
    yield "metrics", str(run.output_dir / METRICS)


def _panel(content: RenderableType, title: str) -> Panel:
    return Panel(content, title=Text(title), title_align="left", border_style="dim", expand=False)
