"""The optimizers of the core, as plugins of the same kind as any other."""

from __future__ import annotations

from collie_core.hookspecs import Component, OptimizerCan

ADAMW = Component(
    build="collie_core.optimizers.adamw:adamw",
    config="collie_core.optimizers.configs:AdamWConfig",
    summary="Adam with decoupled weight decay (arXiv 1711.05101)",
    can=OptimizerCan(state_bytes_per_parameter=8),
)
SGD = Component(
    build="collie_core.optimizers.sgd:sgd",
    config="collie_core.optimizers.configs:SGDConfig",
    summary="gradient descent, with momentum when asked for",
    can=OptimizerCan(state_bytes_per_parameter=4),
)
