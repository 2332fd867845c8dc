"""What the tensors are for that a rank holds between operations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from collie_core.parts import Parts

Held = tuple[str, list[Tensor | None]]
"""A component, and tensors of it."""


def held(parts: Parts) -> Iterator[Held]:
    """Of a run whose model stands. A tensor may come twice: the first component is what it is for."""
    model = parts.model
    yield "weights", weights(model)
    yield "gradients", [parameter.grad for parameter in model.parameters()]
    if not parts.training:
        return
    states = parts.step.states
    copies = [parameter for group in states.optimizer.param_groups for parameter in group["params"]]
    kept = [value for state in states.optimizer.state.values() for value in state.values()]
    yield "gradients", [copy.grad for copy in copies]
    yield "optimizer state", [*copies, *(value for value in kept if isinstance(value, Tensor))]
    of_engine = getattr(states, "held", None)  # of ZeRO
    yield from () if of_engine is None else of_engine().items()


def weights(model: nn.Module) -> list[Tensor | None]:
    """Parameters and buffers, and the shares of those that ZeRO-3 has taken apart."""
    parameters = list(model.parameters())
    return [*parameters, *(getattr(one, "ds_tensor", None) for one in parameters), *model.buffers()]
