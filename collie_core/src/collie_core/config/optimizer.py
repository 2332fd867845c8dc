"""`lr_scheduler:` (the fields of `optimizer:` belong to the optimizer's plugin)"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt

from collie_core.config.base import ConfigModel


class LRSchedulerConfig(ConfigModel):
    """The learning rate over the run."""

    type: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="After warm-up: constant, or falling to 0 in a line or a half cosine."
    )
    warmup_ratio: float = Field(0.0, ge=0, le=1, description="Share of the steps in which lr rises from 0.")
    warmup_steps: NonNegativeInt | None = Field(None, description="The same in steps; instead of warmup_ratio.")
