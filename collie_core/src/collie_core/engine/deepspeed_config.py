"""The DeepSpeed configuration, made in this one function and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collie_core.config.parallel import ParallelConfig


def deepspeed_config(
    *,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    micro_batch_size: int,
    data_parallel_size: int,
    max_grad_norm: float | None,
    overrides: Mapping[str, Any],
    pin_memory: bool = False,
    keeps_small_parameters: bool = True,
) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`; `overrides` is the `deepspeed:` section, merged over it.

    Args:
        pin_memory: whether what is offloaded lies in page-locked memory, which GPUs reach faster.
        keeps_small_parameters: whether stage 3 may leave them whole between steps. It brings those up to date in its
            own optimizer step, which an update in backward goes without.

    Accumulation is CoLLiE's: the number of micro-batches may differ from step to step, and each brings its exact
    share of the global token mean.
    """
    zero: dict[str, Any] = {
        "stage": parallel.zero_stage,
        "overlap_comm": parallel.zero_stage == 3,  # unmanaged accumulation goes without
    }
    if not keeps_small_parameters:
        zero["stage3_param_persistence_threshold"] = 0
    host_memory = {"device": "cpu", "pin_memory": pin_memory}
    if parallel.offload_optimizer:
        zero["offload_optimizer"] = host_memory
    if parallel.offload_param:
        zero["offload_param"] = host_memory
    made: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "train_batch_size": micro_batch_size * data_parallel_size,
        "gradient_accumulation_steps": 1,
        # At stage 3 the boundary is set by hand before the last backward, which leaves DeepSpeed its overlap.
        "managed_gradient_accumulation": parallel.zero_stage == 3,
        "gradient_clipping": max_grad_norm or 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
    return merge(made, overrides)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, section by section."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[key] = merge(below, value) if both else value  # type: ignore[arg-type]
    return merged
