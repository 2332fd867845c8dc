"""The `optimizer:` section of a config with `type: sophia`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from collie_core.api import OptimizerConfig
from collie_optim.options import Beta, Kernel


class SophiaConfig(OptimizerConfig):
    """Sophia-G (Liu et al. 2023). Every `hessian_interval` steps one more forward and backward estimates curvature."""

    type: Literal["sophia"] = "sophia"
    lr: float = Field(1e-4, gt=0, description="Step size: no weight moves by more. Try that of AdamW or a little less.")
    weight_decay: float = Field(0.2, ge=0, description="Decay of matrices and embeddings: acts as lr x weight_decay.")
    betas: tuple[Beta, Beta] = Field(
        (0.96, 0.99), description="Weight of the past in the averages of the gradient and of the curvature."
    )
    rho: float = Field(
        0.05,
        gt=0,
        description="Scale of the curvature, the paper's gamma: the larger, the fewer weights move by all of lr.",
    )
    eps: float = Field(1e-12, gt=0, description="The smallest divisor, for weights that show no curvature.")
    hessian_interval: PositiveInt = Field(10, description="Steps from one estimate to the next, the paper's k.")
    kernel: Kernel = "auto"
