"""The folder of a comparison: what it is of, and what has been found so far."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from collie_core.compare.grid import CELLS, Cell, Grid, Pair
from collie_core.errors import RunError
from collie_core.report.rundir import run_identity, write_json

IDENTITY = "compare.json"
MEMORY = "memory"
LOCK = ".lock"


class Folder:
    """Args:
    root: where it is.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def run(self, cell: Cell) -> Path:
        """The run directory of a cell."""
        return self.root / CELLS / cell.name

    def result(self, cell: Cell) -> Path:
        """Where the result of a cell stands when it is done."""
        return self.root / CELLS / f"{cell.name}.json"

    def log(self, cell: Cell) -> Path:
        """What a cell has printed."""
        return self.root / CELLS / f"{cell.name}.log"

    def memory(self, pair: Pair) -> Path:
        """Where the memory of a pair stands."""
        return self.root / MEMORY / f"{pair.stem}.json"

    @contextmanager
    def taken(self, grid: Grid) -> Iterator[None]:
        """Inside, no other process goes on with this comparison.

        Raises:
            RunError: another does, the folder holds something else, or it cannot be written.
        """
        self._refuse_others()
        with _writing(self.root):
            for name in (CELLS, MEMORY):
                (self.root / name).mkdir(parents=True, exist_ok=True)
            opened = (self.root / LOCK).open("w")
        with opened as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with the last process that has it, however
            except BlockingIOError as error:
                raise RunError(f"another process goes on with the comparison in {self.root}; wait for it") from error
            self._require_same(identity(grid))
            yield

    def _refuse_others(self) -> None:
        if not self.root.exists() or (self.root / IDENTITY).exists():
            return
        if not self.root.is_dir() or any(path.name not in (CELLS, MEMORY, LOCK) for path in self.root.iterdir()):
            raise RunError(f"--output {self.root} is in use, and not by a comparison; name another folder")

    def _require_same(self, here: dict[str, Any]) -> None:
        path = self.root / IDENTITY
        if not path.exists():
            write_whole(path, here)
            return
        there = json.loads(path.read_text(encoding="utf-8"))
        if difference := next(differences(there, here), None):
            raise RunError(
                f"{self.root} holds a comparison of another configuration: {difference}; name another --output, or "
                "delete that folder"
            )


def identity(grid: Grid) -> dict[str, Any]:
    """What must be the same for cells to belong to one comparison. More of them may always be asked for."""
    config = grid.base.model_dump(mode="json")
    del config["train"]["output_dir"]  # where it lies now
    versions = run_identity(grid.base)
    del versions["the configuration"]
    return {"": config, "overrides": sorted(grid.own), "version": versions}


def differences(there: Mapping[str, Any], here: Mapping[str, Any], key: str = "") -> Iterator[str]:
    """In words, by dotted keys."""
    for name in sorted({*there, *here}):
        path = f"{key}.{name}".lstrip(".")
        first, second = there.get(name), here.get(name)
        if isinstance(first, Mapping) and isinstance(second, Mapping):
            yield from differences(first, second, path)
        elif first != second:
            yield f"{path} is {json.dumps(first)} there and {json.dumps(second)} here"


def write_whole(path: Path, value: Any) -> None:
    """JSON, as `replacing` has it."""
    with replacing(path) as beside:
        write_json(beside, value)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write inside, which takes the place of `path` then: whole or not at all.

    Raises:
        RunError: it cannot be written.
    """
    beside = path.with_name(f".{path.name}.new")
    with _writing(path):
        yield beside
        os.replace(beside, path)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path} cannot be written: {error.strerror}; make room there, or name another --output"
        ) from error


def read(path: Path) -> Any:
    """JSON, or None where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
