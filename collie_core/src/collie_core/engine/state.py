"""What training keeps of each parameter, one by one, in and out of an engine: weights and optimizer state.

Every engine lays these out in its own way. Here they have the model's own names and, on this rank, the shape of its
tensor-parallel part, however data-parallel ranks have taken them apart; see `collie_core.checkpoint.states` for the
way from there to whole tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from collie_core.errors import RunError
from collie_core.model.adapters import trainable
from collie_core.model.files import Kind

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from collie_core.model.weights import Read

WEIGHT = "weight"
"""The state that is the parameter itself, in the highest precision in which the engine has it."""

PLUGIN = "plugin."
"""Before the names of states that a plugin keeps in `collie_state`, a dict on a parameter."""

_SCHEDULED = ("params", "lr", "initial_lr")  # of a group: the schedule brings these back

Numbers = Mapping[str, Mapping[str, Any]]
"""Parameter -> options of its group that the optimizer has changed, such as a count of steps."""


class ParameterStates(ABC):
    """The trainable parameters of this rank. It is made before an engine takes the model over.

    Args:
        model: whose trainable parameters these are.
        optimizer: over them.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.parameters: dict[str, nn.Parameter] = trainable(model)
        self.optimizer = optimizer
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        self.group_of = {
            names[id(parameter)]: number
            for number, group in enumerate(optimizer.param_groups)
            for parameter in group["params"]
            if id(parameter) in names
        }
        self._fresh = [dict(group, params=None) for group in optimizer.param_groups]

    @abstractmethod
    def kinds(self, name: str) -> dict[str, Kind]:
        """Shape and type of what there is of a parameter, `WEIGHT` first. The same on all data-parallel ranks."""

    @abstractmethod
    def get(self, name: str, key: str) -> Tensor:
        """A state of a parameter, whole on the first data-parallel rank; anything on others. Collective over them.

        May be a view, good until the next one is asked for.
        """

    @abstractmethod
    def put(self, name: str, key: str, shape: tuple[int, ...], read: Read) -> None:
        """Set a state of a parameter, or make it; `read` gives rows of it in `shape`.

        Raises:
            RunError: the engine cannot hold it.
        """

    def finish(self) -> None:  # noqa: B027  (most have nothing to do)
        """After the last `put`: let everything that was derived from weights follow. Collective."""

    def numbers(self) -> dict[str, dict[str, Any]]:
        """See `Numbers`."""
        found = {}
        for name, number in self.group_of.items():
            group, fresh = self.optimizer.param_groups[number], self._fresh[number]
            changed = {key: value for key, value in group.items() if key not in _SCHEDULED and value != fresh.get(key)}
            if changed:
                found[name] = changed
        return found

    def set_numbers(self, numbers: Numbers) -> None:
        """Set the options of groups; a group without a parameter of the model takes those of any."""
        for number, group in enumerate(self.optimizer.param_groups):
            own = [numbers[name] for name, at in self.group_of.items() if at == number and name in numbers]
            chosen = own[0] if own else next(iter(numbers.values()), {}) if number not in self.group_of.values() else {}
            for key, value in chosen.items():
                group[key] = tuple(value) if isinstance(value, list) else value

    def _scalar_device(self, name: str, device: torch.device) -> torch.device:
        """Where a count of steps belongs: torch's fused kernels read it beside the parameter."""
        group = self.optimizer.param_groups[self.group_of[name]]
        return device if group.get("fused") or group.get("capturable") else torch.device("cpu")


class HeldStates(ParameterStates):
    """Every rank has its tensor-parallel part whole, as a torch optimizer keeps it."""

    def kinds(self, name: str) -> dict[str, Kind]:
        """See `ParameterStates`."""
        weight = self.parameters[name]
        shape = tuple(getattr(weight, "ds_shape", weight.shape))  # ZeRO-3 has taken it apart
        kept = {f"{PLUGIN}{key}": value for key, value in getattr(weight, "collie_state", {}).items()}
        return {WEIGHT: Kind(shape, weight.dtype), **_kinds({**self.optimizer.state.get(weight, {}), **kept}, name)}

    def get(self, name: str, key: str) -> Tensor:
        """See `ParameterStates`."""
        weight = self.parameters[name]
        if key == WEIGHT:
            return weight.detach()
        state: dict[str, Tensor] = self._room(weight, key)
        return state[key.removeprefix(PLUGIN)].detach()

    @torch.no_grad()
    def put(self, name: str, key: str, shape: tuple[int, ...], read: Read) -> None:
        """See `ParameterStates`."""
        weight = self.parameters[name]
        if key == WEIGHT:
            weight.copy_(read(None))
            return
        device = weight.device if shape else self._scalar_device(name, weight.device)
        self._room(weight, key)[key.removeprefix(PLUGIN)] = read(None).to(device)

    def _room(self, weight: nn.Parameter, key: str) -> dict[str, Any]:
        """The states of a parameter among which that of a name is: the optimizer's, or those of a plugin."""
        if not key.startswith(PLUGIN):
            return cast("dict[str, Any]", self.optimizer.state[weight])
        if not hasattr(weight, "collie_state"):
            weight.collie_state = {}  # type: ignore[attr-defined]
        return cast("dict[str, Any]", weight.collie_state)  # type: ignore[attr-defined]


def _kinds(state: Mapping[str, Any], name: str) -> dict[str, Kind]:
    """Of the state that a torch optimizer keeps of a parameter.

    Raises:
        RunError: one is no tensor.
    """
    for key, value in state.items():
        if not isinstance(value, Tensor) or "/" in key or key == WEIGHT:
            raise RunError(f"the optimizer keeps {key} of {name}, which is no tensor: checkpoints cannot hold it")
    return {key: Kind(tuple(value.shape), value.dtype) for key, value in state.items()}
