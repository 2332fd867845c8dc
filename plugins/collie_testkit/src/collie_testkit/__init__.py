"""Checks for plugins of CoLLiE.

An author's whole test file:

    from collie_testkit import checks

    test = checks("optimizer", "lion")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collie_testkit.testing import checks

__all__ = ["checks"]


def __getattr__(name: str) -> Any:
    """`checks` needs pytest, which ranks do not."""
    if name != "checks":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from collie_testkit.testing import checks

    return checks
