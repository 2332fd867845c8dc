"""The `adapter:` section of a config with `type: llama_adapter`: peft's own names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, PositiveInt

from collie_core.api import AdapterConfig

if TYPE_CHECKING:
    from collie_core.api import RunConfig


class LlamaAdapterConfig(AdapterConfig):
    """LLaMA-Adapter (Zhang et al. 2023): prompts in the attention of the last layers, behind a gate."""

    type: Literal["llama_adapter"] = "llama_adapter"
    adapter_len: PositiveInt = Field(10, description="Virtual tokens in each layer.")
    adapter_layers: PositiveInt = Field(30, description="How many layers, counted from the last.")
    target_modules: str | None = Field(None, description="The attention's name in a layer; default: peft's.")

    def refused(self, config: RunConfig) -> str:
        """See `AdapterConfig`."""
        if config.parallel.tensor_parallel_size == 1:
            return ""
        return (
            "peft computes its prompts from the number of heads of the whole layer, which tensor-parallel ranks share; "
            "set tensor_parallel_size to 1 (pipeline_parallel_size and zero_stage share the model too), or use "
            "prefix_tuning"
        )
