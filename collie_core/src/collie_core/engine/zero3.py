"""ZeRO-3 from the first byte: each parameter is partitioned as it is loaded, and each rank reads its own share alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from collie_core.compat import deepspeed_start
from collie_core.engine.deepspeed_step import Ranks, start_deepspeed

if TYPE_CHECKING:
    from collie_core.topology import Topology

Read = Callable[[tuple[int, int] | None], Tensor]
"""(rows [begin, end) of dimension 0, None: all) -> those of this rank's shard."""


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
        share = parameter.ds_tensor  # type: ignore[attr-defined]
        begin = self.topology.dp.rank * share.ds_numel
        end = min(begin + share.ds_numel, math.prod(shape))
        if begin < end:
            share.data[: end - begin].copy_(_flat_range(shape, read, begin, end))


def _flat_range(shape: tuple[int, ...], read: Read, begin: int, end: int) -> Tensor:
    """Entries [begin, end) of a flattened tensor, from the rows that hold them."""
    width = math.prod(shape[1:])
    first, last = begin // width, -(-end // width)
    return read((first, last)).flatten()[begin - first * width : end - first * width]


def _without_broadcast() -> Any:
    """DeepSpeed's partitioning of one parameter, without sending its values round: every rank reads its own."""
    from deepspeed import zero

    class Init(zero.Init):  # type: ignore[misc]
        def partition_only(self, parameter: nn.Parameter) -> None:
            parameter.data = parameter.data.to(self.local_device)
            self._convert_to_deepspeed_param(parameter)
            parameter.partition()

    return Init
