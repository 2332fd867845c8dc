"""metrics.jsonl: the numbers of a run, one JSON object per line."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from collie_core.hookspecs import Run
from collie_core.plugins import hookimpl
from collie_core.report.appended import AppendedFile
from collie_core.report.rundir import METRICS


class MetricsFile:
    """Appends a row for each logged step and each evaluation, written out before the next step begins."""

    def __init__(self) -> None:
        self._file: AppendedFile | None = None  # open between run start and run end

    @hookimpl
    def collie_run_start(self, run: Run) -> None:
        """Open the file."""
        self._file = AppendedFile(run.output_dir / METRICS)

    @hookimpl
    def collie_metrics(self, run: Run, values: Mapping[str, Any]) -> None:
        """Write the row of a step."""
        self._write(values)

    @hookimpl
    def collie_evaluated(self, run: Run, results: Mapping[str, float]) -> None:
        """Write the results of an evaluation; one outside of a run is not part of its record."""
        self._write({"step": run.step, "epoch": run.epoch, **results})

    @hookimpl
    def collie_run_end(self, run: Run) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, row: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        strict = {name: plain(value) for name, value in row.items()}
        self._file.write(json.dumps(strict, ensure_ascii=False, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """`value` as strict JSON has it: numbers of torch and numpy as Python's, NaN and infinities as null."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
