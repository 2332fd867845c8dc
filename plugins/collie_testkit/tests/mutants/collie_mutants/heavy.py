"""A description that imports torch."""

import torch

from collie_core.api import Component, OptimizerCan

HEAVY = Component(
    "collie_mutants.momentum:Momentum", "", "a mutant", OptimizerCan(state_bytes_per_parameter=torch.float32.itemsize)
)
