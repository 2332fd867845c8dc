"""Combinations that `make everything` tests and `make test` leaves out: others have shown the same."""

from __future__ import annotations

import os
from typing import Any

import pytest

in_everything = pytest.mark.skipif(
    "COLLIE_TEST_ALL" not in os.environ, reason="one of many combinations; `make everything` tests it"
)
"""A test for `make everything` alone."""


def more(*values: Any) -> Any:
    """A parameter set for `make everything` alone."""
    return pytest.param(*values, marks=in_everything)
