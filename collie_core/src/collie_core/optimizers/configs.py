"""`optimizer: {type: adamw}` and `optimizer: {type: sgd}`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from collie_core.config.base import OptimizerConfig

Beta = Annotated[float, Field(ge=0, lt=1)]


class AdamWConfig(OptimizerConfig):
    """AdamW."""

    type: Literal["adamw"] = Field("adamw", description="AdamW.")
    lr: float = Field(1e-4, gt=0, description="Learning rate after warm-up: the peak of the schedule.")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="Memory of the gradient and of its square, per step.")
    eps: float = Field(1e-8, gt=0, description="Added to the root of the squared gradient.")


class SGDConfig(OptimizerConfig):
    """Stochastic gradient descent."""

    type: Literal["sgd"] = Field("sgd", description="Stochastic gradient descent.")
    lr: float = Field(1e-2, gt=0, description="Learning rate after warm-up: the peak of the schedule.")
    momentum: float = Field(0.0, ge=0, lt=1, description="Memory of the gradient, per step; 0: none, and no state.")
    nesterov: bool = Field(False, description="Look ahead along the momentum.")

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> SGDConfig:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        return self
