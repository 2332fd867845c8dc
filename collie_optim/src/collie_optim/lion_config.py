"""The `optimizer:` section of a config with `type: lion`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from collie_core.api import OptimizerConfig
from collie_optim.options import Beta, Kernel


class LionConfig(OptimizerConfig):
    """Lion (Chen et al. 2023). A good start is a third to a tenth of AdamW's `lr`, and as much more decay."""

    type: Literal["lion"] = "lion"
    lr: float = Field(
        1e-4,
        gt=0,
        description="Step size: every weight moves by exactly this much. Use a third to a tenth of AdamW's.",
    )
    weight_decay: float = Field(
        0.0,
        ge=0,
        description="Decoupled decay: acts as lr x weight_decay. Use 3 to 10 times more than for AdamW.",
    )
    betas: tuple[Beta, Beta] = Field(
        (0.9, 0.99),
        description="Weight of the past momentum in the update's direction, and in the momentum itself.",
    )
    kernel: Kernel = "auto"
