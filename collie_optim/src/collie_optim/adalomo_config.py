"""The `optimizer:` section of a config with `type: adalomo`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from collie_core.api import OptimizerConfig

NotNegative = Annotated[float, Field(ge=0)]


class AdaLomoConfig(OptimizerConfig):
    """AdaLomo (Lv et al. 2023): LOMO with an adaptive learning rate; states of a row and a column per matrix."""

    type: Literal["adalomo"] = "adalomo"
    lr: float = Field(1e-3, gt=0, description="Step size, relative to the size of the weights of each tensor.")
    decay_rate: float = Field(-0.8, le=0, description="The second moments keep 1 - step^decay_rate of the past.")
    beta: float | None = Field(None, ge=0, lt=1, description="What they keep, if it shall be constant.")
    eps: tuple[NotNegative, NotNegative] = Field(
        (1e-30, 1e-3), description="Added to squared gradients, and the least RMS that weights are taken to have."
    )
    clip_threshold: float = Field(
        1.0, gt=0, description="Largest RMS of the update of a tensor, in units of the learning rate."
    )
    clip_grad_value: float | None = Field(
        None, gt=0, description="Entries of gradients are clipped to this size. Costs no second backward pass."
    )
