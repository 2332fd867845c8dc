"""Writing checkpoints, one at a time: the training waits for a copy in host memory, and not for the disk.

The main rank writes. `Saver.checkpoint` gives a hidden folder and a way to open files in it; what is written to them
stays in host memory until a thread brings it to the disk, takes the digests on the way, and gives the folder its name.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor

from collie_core.checkpoint import files
from collie_core.checkpoint.mirror import Mirror
from collie_core.errors import CollieError, RunError
from collie_core.model.files import DiskFile, NewFile, OpenFile
from collie_core.report.rundir import CHECKPOINTS

if TYPE_CHECKING:
    from collie_core.config.checkpoint import CheckpointConfig
    from collie_core.topology import Topology

FAILING = "a checkpoint cannot be written"
BLOCK = 1 << 24  # bytes that are written and hashed at a time
SPARE = 1 << 28  # bytes of host memory that stay free

logger = logging.getLogger("collie")


class HostFile:
    """The bytes of a file in host memory. See `NewFile`."""

    def __init__(self, path: Path, content: Tensor) -> None:
        self.path, self.content = path, content

    def write(self, offset: int, values: Tensor, dtype: torch.dtype) -> int:
        """See `NewFile`."""
        size = values.numel() * dtype.itemsize
        self.content[offset : offset + size].view(dtype).copy_(values.detach().reshape(-1), non_blocking=True)
        return size

    def close(self) -> None:
        """See `NewFile`: nothing is on the disk yet."""

    def to_disk(self) -> str:
        """Write the file and wait for the disk; gives the sha256 of what was meant to be there."""
        found, content = hashlib.sha256(), self.content.numpy().data
        with self.path.open("wb") as file:
            for start in range(0, len(content), BLOCK):
                block = content[start : start + BLOCK]
                file.write(block)
                found.update(block)
            file.flush()
            os.fsync(file.fileno())
        return found.hexdigest()


class Finish(NamedTuple):
    """What belongs to a checkpoint beside its tensors."""

    write_rest: Callable[[Path], None]  # on the main rank, maybe in a thread: files that need nothing of the run
    best_step: int | None = None  # whose checkpoint is never deleted


class Saver:
    """Args:
    folder: of the checkpoints.
    section: `checkpoint:`.
    topology: of the run.
    """

    def __init__(self, folder: Path, section: CheckpointConfig, topology: Topology) -> None:
        self.folder, self.section, self.topology = folder, section, topology
        self.failure: CollieError | None = None  # of a write behind the training, not told yet
        self.mirror = None if section.store is None else Mirror(f"{section.store}/{CHECKPOINTS}")
        self._thread: threading.Thread | None = None
        self._finished: list[Path] = []
        self._contents: dict[str, Tensor] = {}  # kept: memory that is new costs more time than the copy

    @contextmanager
    def checkpoint(self, step: int, finish: Finish) -> Iterator[tuple[Path, OpenFile]]:
        """Inside, fill the hidden folder; files that are opened so are copies until they are on the disk. Collective.

        Raises:
            CollieError: the main rank cannot write; on every rank.
        """
        self.wait()
        beside = self.folder / f".{files.folder_name(step)}.new"
        held: list[HostFile] = []
        self.topology.on_main(lambda: files.begin(self.folder, step), failing=FAILING)
        try:
            yield beside, lambda path, size: self._open(held, beside, path, size)
            self.topology.on_main(lambda: self._start(beside, step, held, finish), failing=FAILING)
        except BaseException:
            if self.topology.is_main:
                shutil.rmtree(beside, ignore_errors=True)
            raise

    def wait(self) -> None:
        """Until nothing is in flight."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def finished(self) -> list[Path]:
        """The checkpoints that have got their names since this was asked."""
        found, self._finished = self._finished, []
        return found

    def _open(self, held: list[HostFile], beside: Path, path: Path, size: int) -> NewFile:
        if not self.section.asynchronous:
            return DiskFile(path, size)
        name = str(path.relative_to(beside))
        content = self._contents.get(name)
        if content is None or len(content) != size:
            self._contents.pop(name, None)
            free = psutil.virtual_memory().available
            if size + SPARE > free:
                logger.warning(
                    "host memory has %d MiB free, too few for a copy of %s of %d MiB: the training waits for the disk",
                    *(free >> 20, name, size >> 20),
                )
                return DiskFile(path, size)
            content = torch.empty(size, dtype=torch.uint8, pin_memory=self.topology.device.type == "cuda")
            self._contents[name] = content
        held.append(HostFile(path, content))
        return held[-1]

    def _start(self, beside: Path, step: int, held: list[HostFile], finish: Finish) -> None:
        if self.topology.device.type == "cuda":
            torch.cuda.synchronize(self.topology.device)  # copies to pinned memory
        if not self.section.asynchronous:
            self._finish(beside, step, held, finish)
            return
        self._thread = threading.Thread(
            target=self._behind, args=(beside, step, held, finish), name="collie-checkpoint"
        )
        self._thread.start()

    def _behind(self, beside: Path, step: int, held: list[HostFile], finish: Finish) -> None:
        try:
            self._finish(beside, step, held, finish)
        except Exception as error:  # noqa: BLE001  (told at the end of a step)
            shutil.rmtree(beside, ignore_errors=True)
            self.failure = error if isinstance(error, CollieError) else RunError(f"{FAILING}: {error}")

    def _finish(self, beside: Path, step: int, held: list[HostFile], finish: Finish) -> None:
        digests = {str(file.path.relative_to(beside)): file.to_disk() for file in held}
        finish.write_rest(beside)
        final = files.commit(beside, step, digests)
        self._finished.append(final)  # looked up now: `finished` may have put another list in its place
        if (limit := self.section.save_total_limit) is not None:
            files.prune(self.folder, limit, spare=finish.best_step)
        if self.mirror is not None:
            self.mirror.put(final)
            if limit is not None:
                self.mirror.prune(limit, spare=finish.best_step)
