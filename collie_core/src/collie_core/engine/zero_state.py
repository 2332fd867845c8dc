"""The states of parameters that DeepSpeed has laid end to end and dealt out: `ParameterStates` of ZeRO 1 to 3.

DeepSpeed's own functions for this do not know the counts of steps, cannot make states before the first step, and at
stage 3 want sizes that divide by the ranks. So this file, and it alone, knows where DeepSpeed keeps things.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from collie_core.engine.state import WEIGHT, HeldStates, ParameterStates
from collie_core.engine.zero3 import flat_blocks, gathered_on_first, joined
from collie_core.errors import RunError
from collie_core.model.files import Kind

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from collie_core.model.weights import Read
    from collie_core.topology import Topology


def zero_states(model: nn.Module, optimizer: Optimizer, topology: Topology, stage: int) -> _FlatStates:
    """Those of a stage, 1 to 3; to be given the engine as soon as it stands."""
    return _Zero3States(model, optimizer, topology) if stage == 3 else _Zero12States(model, optimizer, topology)


class _FlatStates(ParameterStates):
    """Parameters lie in flat float32 tensors, of which each rank has a part; the optimizer works on those."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, topology: Topology) -> None:
        super().__init__(model, optimizer)
        self.topology = topology
        self._zero: Any = None
        self._put_steps: dict[tuple[int, str], tuple[float, str]] = {}

    def take_over(self, engine: Any) -> None:
        """Learn which engine has laid them out."""
        self._zero = engine.optimizer

    @property
    def zero(self) -> Any:
        """DeepSpeed's optimizer.

        Raises:
            RunError: the `deepspeed:` section has chosen one that keeps states elsewhere.
        """
        expected = ("DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3")
        if type(self._zero).__name__ not in expected or self._zero.optimizer is not self.optimizer:
            raise RunError(
                f"checkpoint: the deepspeed section chooses {type(self._zero).__name__}, whose states checkpoints "
                "cannot hold; leave precision and accumulation to CoLLiE"
            )
        return self._zero

    def held(self) -> dict[str, list[Tensor]]:
        """What the engine keeps at this moment beside what optimizer and model show: copies of weights, which stage 3
        hands to the optimizer for an update alone, gradients, and room to send them.
        """
        buckets = [bucket.buffer for bucket in self._zero.ipg_buckets.values()]
        rooms = [one for buffer in buckets for one in (buffer if isinstance(buffer, list) else [buffer])]
        groups = [group for group in self._zero.averaged_gradients.values() if group is not None]
        gradients = [one for group in groups for one in (group if isinstance(group, list) else [group])]
        copies = list(getattr(self._zero, "fp32_partitioned_groups_flat", []))
        gradients += [getattr(self._zero, "grad_partitions_flat_buffer", None), *(copy.grad for copy in copies)]
        return {
            "optimizer state": copies,
            "gradients": [one for one in gradients if one is not None],
            "communication": [one for one in rooms if one is not None],
        }

    @abstractmethod
    def _flat(self, name: str) -> Tensor:
        """The flat tensor in which this rank has its part of a parameter."""

    def kinds(self, name: str) -> dict[str, Kind]:
        """See `ParameterStates`."""
        flat = self._flat(name)
        shape = tuple(getattr(self.parameters[name], "ds_shape", self.parameters[name].shape))
        found = {WEIGHT: Kind(shape, flat.dtype)}
        for key, value in self.optimizer.state.get(flat, {}).items():
            if not isinstance(value, Tensor) or value.shape not in (flat.shape, torch.Size(())):
                raise RunError(f"the optimizer keeps {key}, which is no tensor of the parameters' shape")
            found[key] = Kind(shape if value.shape == flat.shape else (), value.dtype)
        return found

    def _whole(self, name: str, key: str) -> Tensor:
        """The flat tensor of a state, or a count of steps."""
        flat = self._flat(name)
        found: Tensor = flat if key == WEIGHT else self.optimizer.state[flat][key]
        return found.detach()

    def _room(self, name: str, key: str, read: Read) -> Tensor:
        """The flat tensor of a state, made when it is not there yet."""
        flat = self._flat(name)
        if key == WEIGHT:
            return flat.detach()
        state = self.optimizer.state[flat]
        if key not in state:
            state[key] = torch.zeros_like(flat, dtype=read((0, 0)).dtype, requires_grad=False)
        found: Tensor = state[key]
        return found

    def _put_scalar(self, name: str, key: str, read: Read) -> None:
        """DeepSpeed has one for all parameters of a flat tensor."""
        flat, value = self._flat(name), read(None)
        before, other = self._put_steps.setdefault((id(flat), key), (value.item(), name))
        if before != value.item():
            raise RunError(
                f"the checkpoint has {key}={before:g} for {other} and {value.item():g} for {name}, which ZeRO keeps as "
                "one; resume with parallel.zero_stage=0"
            )
        self.optimizer.state[flat][key] = value.to(self._scalar_device(name, flat.device))


class _Zero12States(_FlatStates):
    """One flat tensor for each parameter group; the weights of the forward pass are copies."""

    def _flat(self, name: str) -> Tensor:
        found: Tensor = self.zero.single_partition_of_fp32_groups[self.group_of[name]]
        return found

    def get(self, name: str, key: str) -> Tensor:
        """See `ParameterStates`."""
        parameter, whole, axis = self.parameters[name], self._whole(name, key), self.topology.dp
        if whole.ndim == 0:
            return whole
        values = torch.zeros(parameter.numel(), dtype=whole.dtype, device=parameter.device)
        mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is not None:  # else this rank has nothing of it
            here, there = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
            values[here.start : here.start + here.numel] = whole.narrow(0, there.start, there.numel)
        if axis.size > 1:  # as integers, which a sum with zeros leaves as they are, to the bit
            assert values.dtype.itemsize == 4
            dist.reduce(values.view(torch.int32), dst=axis.ranks[0], group=axis.group)
        return values.view(parameter.shape)

    @torch.no_grad()
    def put(self, name: str, key: str, shape: tuple[int, ...], read: Read) -> None:
        """See `ParameterStates`."""
        if not shape and self.parameters[name].ndim > 0:
            self._put_scalar(name, key, read)
            return
        mapping: Any = self.parameters[name]._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return
        begin, address = mapping.lp_fragment_address.start, mapping.get_hp_fragment_address()
        room = self._room(name, key, read).narrow(0, address.start, address.numel)
        for low, high, values in flat_blocks(shape, read, begin, begin + address.numel):
            room[low - begin : high - begin].copy_(values)

    def finish(self) -> None:
        """See `ParameterStates`: the copies follow."""
        self._put_steps.clear()
        self.zero.update_lp_params()


class _Zero3States(_FlatStates):
    """Each parameter is cut into equal parts, and those of a sub-group lie in one flat tensor."""

    def _place(self, name: str) -> tuple[int, int, int]:
        """The number of the flat tensor, the first entry of this rank's part, and its length."""
        found: tuple[int, int, int] = self.zero.grad_position[self.zero.get_param_id(self.parameters[name])]
        return found

    def _flat(self, name: str) -> Tensor:
        found: Tensor = self.zero.fp32_partitioned_groups_flat[self._place(name)[0]]
        return found

    def get(self, name: str, key: str) -> Tensor:
        """See `ParameterStates`."""
        parameter: Any = self.parameters[name]
        whole = self._whole(name, key)
        if whole.ndim == 0:
            return whole
        _, begin, length = self._place(name)
        values = joined(whole.narrow(0, begin, length), self.topology.dp, self.topology.device)
        return whole if values is None else values[: parameter.ds_numel].view(parameter.ds_shape)

    @torch.no_grad()
    def put(self, name: str, key: str, shape: tuple[int, ...], read: Read) -> None:
        """See `ParameterStates`."""
        parameter: Any = self.parameters[name]
        if not shape and len(parameter.ds_shape) > 0:
            self._put_scalar(name, key, read)
            return
        _, offset, length = self._place(name)
        room = self._room(name, key, read).narrow(0, offset, length)
        begin = self.topology.dp.rank * length
        for low, high, values in flat_blocks(shape, read, begin, min(begin + length, math.prod(shape))):
            room[low - begin : high - begin].copy_(values)
        if key == WEIGHT:
            parameter.ds_tensor.data.copy_(room)

    def finish(self) -> None:
        """See `ParameterStates`: small parameters, which every rank has whole, follow."""
        self._put_steps.clear()
        small = self.zero.persistent_parameters
        if small:
            small[0].partition(small)
            small[0].all_gather(small)


class GatheredStates(HeldStates):
    """Of an optimizer that works on gathered parameters: its states are whole, the weights are taken apart."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, topology: Topology) -> None:
        super().__init__(model, optimizer)
        self.topology = topology

    def get(self, name: str, key: str) -> Tensor:
        """See `ParameterStates`."""
        if key != WEIGHT:
            return super().get(name, key)
        with gathered_on_first([self.parameters[name]], self.topology.dp, self.topology.device):
            return self.parameters[name].detach()

    @torch.no_grad()
    def put(self, name: str, key: str, shape: tuple[int, ...], read: Read) -> None:
        """See `ParameterStates`."""
        if key != WEIGHT:
            super().put(name, key, shape, read)
            return
        share: Any = self.parameters[name].ds_tensor  # type: ignore[attr-defined]
        begin = self.topology.dp.rank * share.ds_numel
        for low, high, values in flat_blocks(shape, read, begin, min(begin + share.ds_numel, math.prod(shape))):
            share.data[low - begin : high - begin].copy_(values)
