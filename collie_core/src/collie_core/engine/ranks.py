"""Starting DeepSpeed, and the topology as it asks for it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from collie_core.compat import deepspeed_start, forget_deepspeed_groups
from collie_core.errors import RunError

if TYPE_CHECKING:
    from collie_core.topology import Topology


def start_deepspeed(topology: Topology) -> None:
    """Start DeepSpeed; it wants a process group even of one process: that one is in memory, with no open port.

    Raises:
        RunError: it is not installed.
    """
    if find_spec("deepspeed") is None:
        raise RunError("parallel.zero_stage above 0 needs DeepSpeed: pip install 'collie-core[deepspeed]'")
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        forget_deepspeed_groups()
    with deepspeed_start(topology.local_rank):
        import deepspeed

        deepspeed.init_distributed(verbose=False)


class Ranks:
    """The topology in the words of Megatron, which DeepSpeed asks for them."""

    def __init__(self, topology: Topology) -> None:
        # DeepSpeed takes None for the group of all ranks, so an axis of one rank needs a group of its own.
        alone = dist.new_group([topology.rank], use_local_synchronization=True)
        self._axes = {
            name: (axis.size, axis.rank, axis.group or alone, list(axis.ranks))
            for name, axis in {
                "data_parallel": topology.dp,
                "tensor_model_parallel": topology.tp,
                "pipeline_model_parallel": topology.pp,
                "model_parallel": topology.model,
            }.items()
        }

    def get_data_parallel_world_size(self) -> int:
        return self._axes["data_parallel"][0]

    def get_data_parallel_rank(self) -> int:
        return self._axes["data_parallel"][1]

    def get_data_parallel_group(self) -> Any:
        return self._axes["data_parallel"][2]

    def get_data_parallel_group_ranks(self) -> list[int]:
        return self._axes["data_parallel"][3]

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._axes["tensor_model_parallel"][0]

    def get_tensor_model_parallel_rank(self) -> int:
        return self._axes["tensor_model_parallel"][1]

    def get_tensor_model_parallel_group(self) -> Any:
        return self._axes["tensor_model_parallel"][2]

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self._axes["pipeline_model_parallel"][0]

    def get_model_parallel_world_size(self) -> int:
        return self._axes["model_parallel"][0]

    def get_model_parallel_rank(self) -> int:
        """Of the tensor-parallel axis: ZeRO-3 counts replicated gradients where this is 0."""
        return self._axes["tensor_model_parallel"][1]

    def get_model_parallel_group(self) -> Any:
        """Gradient norms and overflows are joined over all parts of a copy."""
        return self._axes["model_parallel"][2]
