"""`train:`"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from collie_core.config.base import ConfigModel, LocalFolder


class TrainConfig(ConfigModel):
    """How long, how much at a time, and where to."""

    max_steps: PositiveInt | None = Field(None, description="Optimizer steps; instead of num_train_epochs.")
    num_train_epochs: float | None = Field(None, gt=0, description="Passes over the data; 1 when nothing is written.")
    per_device_train_batch_size: PositiveInt | None = Field(
        None, description="Samples per forward on one device; 1 when nothing is written."
    )
    gradient_accumulation_steps: PositiveInt | None = Field(None, description="Forwards per optimizer step.")
    global_batch_size: PositiveInt | None = Field(
        None,
        description="Samples per optimizer step: per_device_train_batch_size x gradient_accumulation_steps x "
        "data_parallel_size. Any two decide the third.",
    )
    max_grad_norm: float | None = Field(1.0, ge=0, description="Gradients are scaled down to this norm; 0: never.")
    seed: NonNegativeInt = Field(42, lt=2**31, description="Of weights, dropout and the order of samples.")
    on_nan: Literal["stop", "skip", "rewind"] = Field(
        "stop",
        description="When loss or gradients of a step are no numbers, or the loss jumps: stop the run; leave the step "
        "out; or leave it out and go back to the weights of the last checkpoint.",
    )
    spike_factor: float | None = Field(
        None, gt=1, description="A loss so many times the mean of the last 50 is a jump; null: it is not looked at."
    )
    logging_steps: PositiveInt = Field(
        1, description="Steps between two rows of metrics.jsonl; an evaluation has one too."
    )
    monitors: list[Literal["host", "disk", "network"]] = Field(
        [], description="Numbers of the main rank's machine in each row: CPU and memory, disk traffic, network traffic."
    )
    output_dir: LocalFolder = Field("runs/run", description="The folder of this run.")
    overwrite_output_dir: bool = Field(False, description="Replace the run that output_dir holds already.")
