"""The gradient norm of a model that several ranks hold together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from collie_core.topology import Topology


def counts_here(parameter: nn.Parameter, topology: Topology) -> bool:
    """Whether this rank's part of a gradient goes into the norm: what several ranks hold counts once."""
    return topology.tp.rank == 0 or getattr(parameter, "tensor_model_parallel", False)


def norm_of_model(own: Tensor, topology: Topology) -> Tensor:
    """The L2 norm over the whole model of the norm over what counts here, a float32 scalar. Collective over a copy."""
    if topology.model.size == 1:
        return own
    squares = own.to(topology.device, torch.float64).square()
    dist.all_reduce(squares, group=topology.model.group)
    return squares.sqrt().to(torch.float32)


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients of this norm are multiplied by, as torch's `clip_grad_norm_` has it."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)
