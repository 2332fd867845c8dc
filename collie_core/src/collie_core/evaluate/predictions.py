"""What a model said, sample by sample, as JSON lines in the order of the data set."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from collie_core.errors import RunError
from collie_core.generate import SampleText

if TYPE_CHECKING:
    from collie_core.topology import Topology


class Predictions:
    """A file that the main rank writes while the evaluation goes on; the first few samples are kept to be shown.

    Args:
        path: of the file. It is there when something was written and the evaluation has come to its end.
        show: how many samples to keep.
        topology: of the run.
    """

    def __init__(self, path: Path, show: int, topology: Topology) -> None:
        self.path = path
        self.show = show
        self.topology = topology
        self.shown: list[SampleText] = []
        self._file: IO[str] | None = None

    def add(self, rows: Sequence[Mapping[str, Any]], texts: Sequence[SampleText]) -> None:
        """Add a turn: the rows of every rank, in rank order. Collective."""
        for others_rows, others_texts in self.topology.gather_objects((rows, texts)):
            if self.topology.is_main:
                self._write(others_rows)
                self.shown += others_texts[: max(0, self.show - len(self.shown))]

    def _write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._beside.open("w", encoding="utf-8")
            self._file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        except OSError as error:
            raise RunError(f"the predictions cannot be written to {self.path}: {error.strerror}") from error

    @property
    def _beside(self) -> Path:
        return self.path.with_name(self.path.name + ".new")

    @contextmanager
    def written(self) -> Iterator[None]:
        """After it the file is there whole, or with an exception not at all."""
        try:
            yield
            if self._file is not None:
                self._file.close()
                self._beside.replace(self.path)
        finally:
            if self._file is not None:
                self._file.close()
                self._beside.unlink(missing_ok=True)
                self._file = None
