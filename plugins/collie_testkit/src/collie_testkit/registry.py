"""The checks that there are. A check is a function of a `Context` that returns when the plugin is right.

    @check("optimizer", level=1, mutant="decays-without-gradient")
    def no_gradient(context: Context) -> None:
        "A parameter without a gradient is left alone."

Its docstring says what it demands, its name is what `known_failures` calls it. Each has a mutant: a plugin of that
name, broken on purpose, which this check catches and none before it. So no check can be idle, and none copies another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collie_testkit.context import Context

KINDS = ("model", "optimizer", "adapter", "metric", "server")
"""Kinds that have checks of their own; the other kinds have those of the package."""

LEVELS = {0: "package", 1: "one process", 2: "several processes", 3: "GPU"}


@dataclass(frozen=True)
class Check:
    """One thing that every plugin of a kind promises."""

    name: str
    kinds: tuple[str, ...]  # (): every kind
    level: int  # see LEVELS
    mutant: str  # the plugin that it catches
    concerns: Callable[[Any], bool]  # whether a plugin with these capabilities is checked
    run: Callable[[Context], None]

    @property
    def demand(self) -> str:
        """What it demands, in a sentence."""
        return " ".join((self.run.__doc__ or "").partition("\n\n")[0].split())


class Failed(AssertionError):
    """The plugin is not right; the message says what was found and what should have been."""


class Skipped(Exception):
    """The check cannot be made, for the reason that it gives."""


_CHECKS: list[Check] = []


def check(
    *kinds: str, level: int, mutant: str, concerns: Callable[[Any], bool] = lambda can: True
) -> Callable[[Callable[[Context], None]], Callable[[Context], None]]:
    """Register a check of plugins of these kinds, or of all.

    Args:
        concerns: of the `can` of a plugin, whether the check is for it.
    """

    def register(function: Callable[[Context], None]) -> Callable[[Context], None]:
        _CHECKS.append(Check(function.__name__, kinds, level, mutant, concerns, function))
        return function

    return register


def checks_of(kind: str) -> list[Check]:
    """Those of a kind, weaker ones first: by level, and at one level in the order in which they are written."""
    for module in ("package", *({kind} & set(KINDS))):
        import_module(f"collie_testkit.{module}")
    found = [check for check in _CHECKS if kind in check.kinds or not check.kinds]
    return sorted(found, key=lambda check: check.level)


def expect(holds: object, message: str) -> None:
    """Raise `Failed` with `message` unless `holds`."""
    if not holds:
        raise Failed(message)
