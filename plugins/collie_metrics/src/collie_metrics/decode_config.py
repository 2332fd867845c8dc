"""An item `{type: decode}` of the `metrics` of an evaluator."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from collie_core.api import ComponentConfig


class DecodeConfig(ComponentConfig):
    """A few answers to read."""

    type: Literal["decode"] = "decode"
    rows: PositiveInt = Field(10, le=1000, description="How many answers are kept, of different references first.")
