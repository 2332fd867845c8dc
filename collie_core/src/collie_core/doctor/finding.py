"""What a check has found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One sentence, and when something is wrong, what to do."""

    level: Level
    what: str
    way_out: str = ""


def ok(what: str) -> Finding:
    """All is well."""
    return Finding("ok", what)


def warning(what: str, way_out: str) -> Finding:
    """Runs work, but slower or less safely than they could."""
    return Finding("warning", what, way_out)


def error(what: str, way_out: str) -> Finding:
    """Runs will fail or give wrong results."""
    return Finding("error", what, way_out)
