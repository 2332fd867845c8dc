"""ZeRO-3 from the first byte: parameters are partitioned as they are loaded; each rank reads its own share alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from collie_core.compat import deepspeed_start
from collie_core.engine.ranks import Ranks, start_deepspeed
from collie_core.model.weights import Read

if TYPE_CHECKING:
    from collie_core.topology import Axis, Topology

BLOCK = 1 << 19  # entries read or sent at a time


class Zero3Store:
    """Puts parameters into a model, partitioned over the data-parallel ranks.

    Args:
        topology: of the run.
        config: the DeepSpeed configuration.
        dtype: of the weights in the engine.
    """

    def __init__(self, topology: Topology, config: dict[str, Any], dtype: torch.dtype) -> None:
        start_deepspeed(topology)
        self.topology = topology
        self.dtype = dtype
        with deepspeed_start(topology.local_rank):
            self._init = _without_broadcast()(
                data_parallel_group=Ranks(topology).get_data_parallel_group(),
                # Without the batch sizes, which it would compare with the number of all processes.
                config_dict_or_path={key: config[key] for key in ("zero_optimization", "bf16", "fp16")}
                | {"train_micro_batch_size_per_gpu": 1},
                dtype=dtype,
                enabled=False,
            )

    def __call__(self, module: nn.Module, name: str, shape: tuple[int, ...], read: Read) -> None:
        """Make parameter `name` of `module`, of which this rank holds its share of the flattened values."""
        old = module._parameters[name]
        assert old is not None
        # Room for the whole, which the system hands out only where it is written.
        parameter = nn.Parameter(torch.empty(shape, dtype=self.dtype), requires_grad=old.requires_grad)
        parameter.__dict__.update(old.__dict__)
        module._parameters[name] = parameter
        self._init.partition_only(parameter)
        self._fill(parameter, shape, read)

    def _fill(self, parameter: nn.Parameter, shape: tuple[int, ...], read: Read) -> None:
        """Give this rank's share its values."""
        share = parameter.ds_tensor  # type: ignore[attr-defined]
        begin = self.topology.dp.rank * share.ds_numel
        end = min(begin + share.ds_numel, math.prod(shape))
        for low, high, values in flat_blocks(shape, read, begin, end):
            share.data[low - begin : high - begin].copy_(values)


def flat_blocks(shape: tuple[int, ...], read: Read, begin: int, end: int) -> Iterator[tuple[int, int, Tensor]]:
    """Entries [begin, end) of a flattened tensor, in blocks of whole rows: (first, end, values)."""
    width = math.prod(shape[1:])
    step = max(1, BLOCK // width) * width
    for start in range(begin // width * width, end, step):
        low, high = max(begin, start), min(end, start + step)
        rows = read((start // width, -(-high // width))).flatten()
        yield low, high, rows[low - start : high - start]


@contextmanager
def gathered_on_first(parameters: Sequence[nn.Parameter], axis: Axis, device: torch.device) -> Iterator[None]:
    """Inside, partitioned parameters stand whole on the first data-parallel rank. Collective over the axis.

    DeepSpeed's own context gathers on every rank, with about four times the memory of the tensor.
    """
    taken_apart = [parameter for parameter in parameters if parameter.numel() != parameter.ds_numel]  # type: ignore[attr-defined]
    before = [parameter.data for parameter in taken_apart]
    for parameter in taken_apart:
        whole = joined(parameter.ds_tensor.data, axis, device)  # type: ignore[attr-defined]
        if whole is not None:
            parameter.data = whole[: parameter.ds_numel].view(parameter.ds_shape)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for parameter, empty in zip(taken_apart, before, strict=True):
            parameter.data = empty


def joined(share: Tensor, axis: Axis, device: torch.device) -> Tensor | None:
    """The shares of all ranks, equally long, end to end on the first; None on the others. Collective over the axis."""
    size = share.numel()
    if axis.size == 1:
        return share.to(device, copy=True)
    whole = torch.empty(axis.size * size, dtype=share.dtype, device=device) if axis.rank == 0 else None
    for begin in range(0, size, BLOCK):
        block = share[begin : begin + BLOCK].to(device).contiguous()
        received = None if whole is None else [torch.empty_like(block) for _ in range(axis.size)]
        dist.gather(block, received, dst=axis.ranks[0], group=axis.group)
        if whole is not None:
            for rank, part in enumerate(received or ()):
                start = rank * size + begin
                whole[start : start + len(part)] = part
    return whole


def _without_broadcast() -> Any:
    """DeepSpeed's partitioning of one parameter, without sending its values round: every rank reads its own."""
    from deepspeed import zero

    class Init(zero.Init):  # type: ignore[misc]
        def partition_only(self, parameter: nn.Parameter) -> None:
            parameter.data = parameter.data.to(self.local_device)
            self._convert_to_deepspeed_param(parameter)
            parameter.partition()  # type: ignore[attr-defined]

    return Init
