"""A run for the sake of its steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from collie_core.loop import Trainer


class Rehearsal(Trainer):
    """Keeps nothing of what it has trained."""

    def _export(self, path: Path, add: Callable[[Path], None] = lambda folder: None) -> Path:
        return path
