"""The `optimizer:` section of a config with `type: adan`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from collie_core.api import OptimizerConfig
from collie_optim.options import Beta, Kernel


class AdanConfig(OptimizerConfig):
    """Adan (Xie et al. 2022). It stands a learning rate 5 to 10 times that of AdamW."""

    type: Literal["adan"] = "adan"
    lr: float = Field(1e-3, gt=0, description="Learning rate after warm-up. Try 5 to 10 times AdamW's.")
    weight_decay: float = Field(0.02, ge=0, description="Decay of matrices and embeddings: acts as lr x weight_decay.")
    betas: tuple[Beta, Beta, Beta] = Field(
        (0.98, 0.92, 0.99),
        description="Weight of the past in the averages of the gradient, its change, and its square; 1 - the paper's.",
    )
    eps: float = Field(1e-8, gt=0, description="Added to the divisor, the root of the average square.")
    proximal: bool = Field(
        True, description="Decay after the update, by dividing, as in the paper; false: before it, as AdamW does."
    )
    variant: Literal["authors", "paper"] = Field(
        "authors",
        description="authors: averages start at 0 and are corrected, as in the authors' code; paper: they start at the "
        "first gradient, as in Algorithm 1.",
    )
    restart_steps: PositiveInt | None = Field(None, description="Start the averages anew after so many steps.")
    kernel: Kernel = "auto"
