"""`parallel:`"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from collie_core.config.base import ConfigModel


class ParallelConfig(ConfigModel):
    """How the processes share the work."""

    tensor_parallel_size: PositiveInt = Field(1, description="Processes that share each layer.")
    sequence_parallel: bool = Field(
        False,
        description="Tensor-parallel ranks also share the positions between the layers' matrices: less memory.",
    )
    pipeline_parallel_size: PositiveInt = Field(1, description="Stages that the layers are dealt out to.")
    pipeline_cuts: Literal["parameters", "uniform"] | list[PositiveInt] = Field(
        "parameters",
        description="How layers are dealt out: so that stages hold about as many parameters, or layers; or the number "
        "of layers of each stage.",
    )
    data_parallel_size: PositiveInt | Literal["auto"] = Field(
        "auto",
        description="Copies of the model, each with its own samples. auto: as many as there are processes.",
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        0,
        description="What data-parallel ranks share: 1 optimizer states, 2 and gradients, 3 and parameters.",
    )
    offload_optimizer: bool = Field(False, description="Optimizer states and update in CPU memory; zero_stage 1 to 3.")
    offload_param: bool = Field(False, description="Parameters in CPU memory while no layer needs them; zero_stage 3.")
    timeout_s: float = Field(
        1800.0,
        gt=0,
        le=1e9,
        description="Seconds that a rank may wait for others, or stand still in a run, until all end and tell where "
        "each one stands.",
    )

    @property
    def copy_size(self) -> int:
        """The number of processes that together hold one copy of the model."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def fewest_processes(self) -> int:
        """The number of processes that these sizes need at least."""
        return self.copy_size * (1 if self.data_parallel_size == "auto" else self.data_parallel_size)

    @property
    def offloads(self) -> bool:
        """Whether anything is kept in host memory that a GPU works on."""
        return self.offload_optimizer or self.offload_param
