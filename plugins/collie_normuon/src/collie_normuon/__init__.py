"""The optimizer NorMuon for CoLLiE. This file only describes it: importing it costs no torch."""

from typing import Annotated, Literal

from pydantic import Field

from collie_core.api import Component, OptimizerCan, OptimizerConfig

Beta = Annotated[float, Field(ge=0, lt=1)]


class NorMuonConfig(OptimizerConfig):
    """NorMuon (arXiv 2510.05491) for the matrices of hidden layers; AdamW for embeddings, head and vectors."""

    type: Literal["normuon"] = "normuon"
    betas: tuple[Beta, Beta] = Field(
        (0.95, 0.95), description="Memory of the gradient, and of the mean square of each row of an update, per step."
    )
    eps: float = Field(1e-8, gt=0, description="Added to the root mean square of a row.")
    ns_steps: int = Field(5, ge=1, le=99, description="Iterations of Newton-Schulz that orthogonalize an update.")
    ns_dtype: Literal["float32", "bfloat16"] = Field("float32", description="Their precision.")
    adamw_betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="Betas of the other parameters.")
    adamw_eps: float = Field(1e-8, gt=0, description="Epsilon of the other parameters.")


NORMUON = Component(
    build="collie_normuon.optimizer:NorMuon",
    config="collie_normuon:NorMuonConfig",
    summary="Muon with updates normalised by row, AdamW for the rest (arXiv 2510.05491)",
    can=OptimizerCan(8, whole_tensors=True, parameter_roles=True, factored_state={"row_squares": -1}),
)  # 8 bytes are AdamW's; hidden matrices: 4
