"""Checks for plugins of CoLLiE.

An author's whole test file:

    from collie_testkit import checks

    test = checks("optimizer", "lion")
"""

from __future__ import annotations

from collie_testkit.testing import checks

__all__ = ["checks"]
