"""The generated DeepSpeed configuration, literally."""

from __future__ import annotations

import torch

from collie_core.config.parallel import ParallelConfig
from collie_core.engine.deepspeed_config import deepspeed_config, merge


def test_golden_zero_2_bfloat16_with_overrides() -> None:
    made = deepspeed_config(
        parallel=ParallelConfig(zero_stage=2),
        dtype=torch.bfloat16,
        micro_batch_size=4,
        data_parallel_size=2,
        max_grad_norm=1.0,
        overrides={"zero_optimization": {"reduce_bucket_size": 1000}, "steps_per_print": 5},
    )
    assert made == {
        "train_micro_batch_size_per_gpu": 4,
        "train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2, "overlap_comm": False, "reduce_bucket_size": 1000},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "steps_per_print": 5,
        "wall_clock_breakdown": False,
    }


def test_golden_zero_1_float32_without_clipping() -> None:
    made = deepspeed_config(
        parallel=ParallelConfig(zero_stage=1),
        dtype=torch.float32,
        micro_batch_size=1,
        data_parallel_size=1,
        max_grad_norm=None,
        overrides={},
    )
    assert made["gradient_clipping"] == 0.0
    assert made["bf16"] == made["fp16"] == {"enabled": False}
    assert made["zero_optimization"] == {"stage": 1, "overlap_comm": False}


def test_merge_goes_down_into_sections_and_leaves_its_arguments() -> None:
    base, over = {"a": {"x": 1, "y": 2}, "b": 3}, {"a": {"y": 5}, "b": {"z": 1}}
    assert merge(base, over) == {"a": {"x": 1, "y": 5}, "b": {"z": 1}}
    assert base == {"a": {"x": 1, "y": 2}, "b": 3}


def test_golden_zero_3_with_offload() -> None:
    made = deepspeed_config(
        parallel=ParallelConfig(zero_stage=3, offload_optimizer=True, offload_param=True),
        dtype=torch.float32,
        micro_batch_size=1,
        data_parallel_size=1,
        max_grad_norm=None,
        overrides={},
    )
    where = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    assert made["zero_optimization"] == {
        "stage": 3,
        "overlap_comm": True,
        "offload_optimizer": where,
        "offload_param": where,
    }
