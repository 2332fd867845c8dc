"""Optimizers for CoLLiE. This file only describes them: importing it costs neither torch nor pydantic."""

from collie_core.api import Component, OptimizerCan

ADAN = Component(
    build="collie_optim.adan:Adan",
    config="collie_optim.adan_config:AdanConfig",
    summary="Nesterov momentum from gradients and their changes (arXiv 2208.06677)",
    can=OptimizerCan(state_bytes_per_parameter=16.0),  # three averages and the previous gradient
)
LION = Component(
    build="collie_optim.lion:Lion",
    config="collie_optim.lion_config:LionConfig",
    summary="sign momentum (arXiv 2302.06675)",
    can=OptimizerCan(state_bytes_per_parameter=4.0),  # one momentum tensor; AdamW keeps two
)

LOMO = Component(
    build="collie_optim.lomo:Lomo",
    config="collie_optim.lomo_config:LomoConfig",
    summary="gradient descent fused into backward, without gradients or states to hold (arXiv 2306.09782)",
    can=OptimizerCan(state_bytes_per_parameter=0.0, fuses_backward=True),
)
ADALOMO = Component(
    build="collie_optim.adalomo:AdaLomo",
    config="collie_optim.adalomo_config:AdaLomoConfig",
    summary="LOMO with adaptive learning rates from factored second moments (arXiv 2310.10195)",
    can=OptimizerCan(  # a row and a column of each matrix
        state_bytes_per_parameter=0.02, fuses_backward=True, factored_state={"row": -1, "col": -2}
    ),
)
MUON = Component(
    build="collie_optim.muon:Muon",
    config="collie_optim.muon_config:MuonConfig",
    summary="orthogonal updates of hidden matrices, AdamW for the rest (Jordan et al. 2024)",
    can=OptimizerCan(state_bytes_per_parameter=8.0, whole_tensors=True, parameter_roles=True),  # hidden matrices: 4
)
SOPHIA = Component(
    build="collie_optim.sophia:Sophia",
    config="collie_optim.sophia_config:SophiaConfig",
    summary="momentum over a diagonal curvature, clipped by element: Sophia-G (arXiv 2305.14342)",
    can=OptimizerCan(state_bytes_per_parameter=8.0, estimates_curvature=True),
)

__all__ = ["ADALOMO", "ADAN", "LION", "LOMO", "MUON", "SOPHIA"]
