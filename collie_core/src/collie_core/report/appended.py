"""A file of lines that grows during a run, and outlives a disk that is full for a while."""

from __future__ import annotations

import logging
from pathlib import Path

logger = logging.getLogger("collie")


class AppendedFile:
    """Every line is on its way to the disk when `write` returns. Lines that find no room are kept and tried again.

    Args:
        path: of the file.
        fresh: begin with an empty file.
    """

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        self._path = path
        self._file = path.open("wb" if fresh else "ab", buffering=0)
        self._left = b""
        self._told = False

    def write(self, text: str) -> None:
        """Append text."""
        self._left += text.encode()
        try:
            while self._left:
                self._left = self._left[self._file.write(self._left) :]
        except OSError as error:
            if not self._told:
                logger.warning("%s cannot be written: %s; its lines are kept until it can", self._path, error.strerror)
            self._told = True

    @property
    def is_behind(self) -> bool:
        """Whether lines have found no room yet."""
        return bool(self._left)

    def close(self) -> None:
        """Try once more what is left, and say so when it is lost."""
        self.write("")
        if self._left:
            logger.warning("%s lacks its last %d lines", self._path, self._left.count(b"\n"))
        self._file.close()
