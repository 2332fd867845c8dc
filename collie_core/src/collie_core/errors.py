"""Every error a user can act on. All are `ValueError`s, so that embedding programs need one `except`.

CollieError
├── ConfigError    the configuration: file, line, key, value, rule, what to turn
├── PluginError    an extension: distribution, version, kind, name, cause, how to block it
├── DataError      the data: file and line of the sample
├── ModelError     weights, tokenizer or architecture: the tensor or key by name
└── RunError       the run itself: an output folder in use, a rank that is lost
    ├── NotANumber  a loss or gradient that is none
    └── OutOfMemory a device that is full: what it held, and what would fit
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


class CollieError(ValueError):
    """The base of all errors whose message is written for the person who runs CoLLiE."""

    exit_code: ClassVar[int] = 1  # 2: what was given is wrong, and doing it again would not help


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a configuration."""

    key: str  # dotted, "" when the whole file is meant
    rule: str  # what was expected
    value: object = None  # what was written; `MISSING` when nothing was
    hint: str = ""  # the nearest known name, or the knob to turn
    origin: str = ""  # "run.yaml:14", "command line", or "" for a config made in Python

    def __str__(self) -> str:
        place = f"{self.origin}: " if self.origin else ""
        written = "" if self.value is MISSING else f" = {_short(self.value)}"
        hint = f" {self.hint}" if self.hint else ""
        return f"{place}{self.key or 'the file'}{written if self.key else ''}: {self.rule}.{hint}"


MISSING = object()


def _short(value: object, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


class ConfigError(CollieError):
    """All problems of a configuration at once."""

    exit_code = 2

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in problems))


class PluginError(CollieError):
    """An extension that was asked for cannot be found, is ambiguous, or does not work."""


class DataError(CollieError):
    """A data file or sample cannot be used; the message gives file and line."""

    exit_code = 2


class ModelError(CollieError):
    """Weights, architecture or tokenizer do not fit; the message names the tensor or key."""

    exit_code = 2


class RunError(CollieError):
    """The run cannot start or go on."""


class NotANumber(RunError):
    """Loss or gradients of a step are no numbers, or jump. `damaged`: the weights have been updated with them."""

    def __init__(self, message: str, *, damaged: bool = False) -> None:
        super().__init__(message)
        self.damaged = damaged


class OutOfMemory(RunError):
    """Memory was refused; its cause is torch's error."""
