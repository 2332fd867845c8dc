"""The `optimizer:` section of a config with `type: lomo`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from collie_core.api import OptimizerConfig


class LomoConfig(OptimizerConfig):
    """LOMO (Lv et al. 2023): gradient descent fused into backward; no states, and one gradient at a time."""

    type: Literal["lomo"] = "lomo"
    lr: float = Field(1e-2, gt=0, description="Step size, that of plain gradient descent: far above AdamW's.")
    clip_grad_value: float | None = Field(
        None, gt=0, description="Entries of gradients are clipped to this size. Costs no second backward pass."
    )
