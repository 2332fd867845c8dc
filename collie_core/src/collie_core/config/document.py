"""A configuration before it is validated: plain data, and where each key was written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from collie_core.errors import Problem


@dataclass
class Document:
    """Mutable while a file, its aliases and the overrides are put together."""

    data: dict[str, Any]
    origins: dict[str, str] = field(default_factory=dict)  # dotted key -> "run.yaml:14" or "command line"
    notes: list[str] = field(default_factory=list)  # names of other tools that were understood
    problems: list[Problem] = field(default_factory=list)

    def origin(self, key: str) -> str:
        """Where `key`, or else the section around it, was written; "" for a configuration made in Python."""
        while key and key not in self.origins:
            key = key.rpartition(".")[0]
        return self.origins.get(key, "")

    def located(self, problems: Iterable[Problem]) -> list[Problem]:
        """The problems with their origins, each once, in the order of the file."""
        placed = [
            problem if problem.origin else replace(problem, origin=self.origin(problem.key)) for problem in problems
        ]
        unique = {str(problem): problem for problem in placed}
        return sorted(unique.values(), key=lambda problem: _line(problem.origin))


def _line(origin: str) -> int:
    number = origin.rpartition(":")[2]
    return int(number) if number.isdigit() else 0
