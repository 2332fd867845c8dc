"""Optimizers for CoLLiE. This file only describes them: importing it costs neither torch nor pydantic."""

from collie_core.api import Component, OptimizerCan

LION = Component(
    build="collie_optim.lion:Lion",
    config="collie_optim.lion_config:LionConfig",
    summary="sign momentum (arXiv 2302.06675)",
    can=OptimizerCan(state_bytes_per_parameter=4.0),  # one momentum tensor; AdamW keeps two
)

__all__ = ["LION"]
