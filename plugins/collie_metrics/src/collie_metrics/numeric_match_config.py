"""An item `{type: numeric-match}` of the `metrics` of an evaluator."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from collie_core.api import ComponentConfig


class NumericMatchConfig(ComponentConfig):
    """Where the number of an answer stands, and how near it must come."""

    type: Literal["numeric-match"] = "numeric-match"
    marker: str | None = Field(
        "####",
        min_length=1,
        description="The number after the last marker counts; without a marker, the last one. null: always the last.",
    )
    require_marker: bool = Field(False, description="An answer without the marker is wrong.")
    tolerance: float = Field(0.0, ge=0, lt=1, description="How far the answer may be off, as a share of the target.")

    @model_validator(mode="after")
    def _marked(self) -> NumericMatchConfig:
        if self.require_marker and self.marker is None:
            raise ValueError("require_marker needs a marker, not null")
        return self
