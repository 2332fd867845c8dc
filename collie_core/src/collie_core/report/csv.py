"""metrics.csv: the rows of metrics.jsonl as a table, for spreadsheets."""

from __future__ import annotations

import csv
import io
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from collie_core.hookspecs import Run
from collie_core.plugins import hookimpl
from collie_core.report.appended import AppendedFile
from collie_core.report.metrics import plain
from collie_core.report.rundir import CSV

logger = logging.getLogger("collie")


class CsvFile:
    """Appends a row for each logged step and each evaluation.

    A column that was not there before is added at the end, to the rows above without a value.
    """

    def __init__(self) -> None:
        self._path = Path()
        self._file: AppendedFile | None = None  # open between run start and run end
        self._columns: list[str] = []

    @hookimpl
    def collie_run_start(self, run: Run) -> None:
        """Open the file; a run that resumes goes on with the one that is there."""
        self._path, self._columns = run.output_dir / CSV, []
        if goes_on := run.step > 0 and self._path.is_file():
            with self._open(self._path, "r") as old:
                self._columns = next(csv.reader(old), [])
        self._file = AppendedFile(self._path, fresh=not goes_on)

    @hookimpl
    def collie_metrics(self, values: Mapping[str, Any]) -> None:
        """Write the row of a step."""
        self._write(values)

    @hookimpl
    def collie_evaluated(self, run: Run, results: Mapping[str, float]) -> None:
        """Write the results of an evaluation; one outside of a run is not part of its record."""
        self._write({"step": run.step, "epoch": run.epoch, **results})

    @hookimpl
    def collie_run_end(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, row: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        new = [name for name in row if name not in self._columns]
        if new and not self._file.is_behind:
            self._widen(new)
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(plain(row.get(name)) for name in self._columns)
        self._file.write(line.getvalue())

    def _widen(self, new: list[str]) -> None:
        """The whole file again with more columns, put in place at once; where there is no room, with a later row."""
        assert self._file is not None
        beside, columns = self._path.with_suffix(".csv.new"), self._columns + new
        try:
            with self._open(self._path, "r") as old, self._open(beside, "w") as file:
                rows = list(csv.reader(old))[1:]
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(columns)
                writer.writerows([*cells, *[""] * (len(columns) - len(cells))] for cells in rows)
            os.replace(beside, self._path)
        except OSError as error:
            logger.warning("%s cannot get the columns %s: %s", self._path, ", ".join(new), error.strerror)
            return
        self._file.close()
        self._file, self._columns = AppendedFile(self._path), columns

    @staticmethod
    def _open(path: Path, mode: str) -> IO[str]:
        return open(path, mode, encoding="utf-8", newline="")
