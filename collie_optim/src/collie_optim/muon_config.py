"""The `optimizer:` section of a config with `type: muon`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from collie_core.api import OptimizerConfig

Beta = Annotated[float, Field(ge=0, lt=1)]


class MuonConfig(OptimizerConfig):
    """Muon (Jordan et al. 2024) for the matrices of hidden layers; AdamW for embeddings, head and vectors."""

    type: Literal["muon"] = "muon"
    lr: float = Field(
        2e-2,
        gt=0,
        description="Step size of hidden matrices: the spectral norm of an update, which is not AdamW's scale.",
    )
    momentum: float = Field(0.95, ge=0, lt=1, description="Memory of the gradient, per step.")
    nesterov: bool = Field(True, description="Look ahead along the momentum.")
    ns_steps: PositiveInt = Field(5, le=99, description="Iterations of Newton-Schulz that orthogonalize an update.")
    ns_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Their precision. auto: bfloat16 on a GPU, float32 on a CPU."
    )
    scale: Literal["original", "match_rms_adamw"] = Field(
        "original",
        description="Size of updates: Jordan's, by the shape; or that of AdamW's, so that lr can be AdamW's too.",
    )
    adamw_lr: float = Field(3e-4, gt=0, description="Step size of the other parameters.")
    adamw_betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="Betas of the other parameters.")
    adamw_eps: float = Field(1e-8, gt=0, description="Epsilon of the other parameters.")
