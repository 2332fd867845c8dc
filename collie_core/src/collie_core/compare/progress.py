"""What a person sees while the cells of a comparison run."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from collie_core.report import text
from collie_core.report.rundir import METRICS

TAIL = 4096  # bytes at the end of metrics.jsonl, which hold the last row
REFRESH_S = 0.25


class Lines:
    """A line for each cell, and in a terminal its last numbers while it runs."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live: Live | None = None
        self._looked = 0.0
        self._what = ""
        self._run: Path | None = None

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def begins(self, what: str, number: int, count: int, run: Path | None) -> None:
        """Name it."""
        self._what, self._run = f"{number}/{count}  {what}", run
        if self.console.is_terminal:
            # Refreshed by `looks` and not by a thread, beside which one should not fork.
            options: dict[str, Any] = {
                "auto_refresh": False,
                "transient": True,
                "redirect_stdout": False,
                "redirect_stderr": False,
            }
            self._live = Live(Text(self._what), console=self.console, **options)
            self._live.start(refresh=True)
        else:
            self.console.print(self._what, end=" ...", markup=False, soft_wrap=True)

    def looks(self) -> None:
        """Show the last row of the run."""
        if self._live is None or self._run is None or time.monotonic() < self._looked + REFRESH_S:
            return
        self._looked = time.monotonic()
        self._live.update(Text(f"{self._what}  {_numbers(self._run / METRICS)}"), refresh=True)

    def ended(self, status: str, reason: str, run: Path | None) -> None:
        """How it has ended."""
        self._stop()
        head = f"{self._what} " if self.console.is_terminal else ""
        numbers = _numbers(run / METRICS) if run is not None else ""
        told = f"{status}  {numbers}" if status == "done" else f"{status}: {text.one_line(reason, 400)}"
        self.console.print(f"{head} {told}".rstrip(), markup=False, soft_wrap=True)

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def make_progress() -> Lines:
    """On standard output."""
    return Lines(Console(highlight=False))


def _numbers(path: Path) -> str:
    """The last numbers of a run that may be writing them."""
    row: dict[str, float] = {}
    with suppress(OSError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        for line in file.read().splitlines():
            with suppress(ValueError):  # cut off at either end
                row |= json.loads(line)
    return "  ".join(_words(row))


def _words(row: dict[str, float]) -> list[str]:
    found = [f"step {row['step']}"] if "step" in row else []
    found += [f"{name} {text.loss(row[name])}" for name in ("loss", "eval/loss") if name in row]
    return found + ([f"{text.rate(row['tokens_per_second'])} tok/s"] if "tokens_per_second" in row else [])
