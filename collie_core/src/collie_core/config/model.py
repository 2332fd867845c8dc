"""`model:`"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from collie_core.config.base import ConfigModel, PlainMapping


def _checkpointing(value: Any) -> Any:
    return {True: "full", False: "none"}[value] if isinstance(value, bool) else value


Checkpointing = Annotated[
    Literal["none", "full"],
    BeforeValidator(_checkpointing, json_schema_input_type=Literal["none", "full"] | bool),
]


class ModelConfig(ConfigModel):
    """The model: pretrained weights, or an architecture to train from random ones."""

    model_name_or_path: str | None = Field(None, min_length=1, description="A folder or a hub id, with its weights.")
    config: PlainMapping | None = Field(
        None,
        description="Train from random weights: `model_type` and the fields of its transformers config. "
        "A missing vocab_size is the tokenizer's.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Precision of forward and backward. auto: bfloat16 where the GPU has it, float32 on CPU.",
    )
    attn_implementation: str = Field("sdpa", min_length=1, description="Attention kernels: sdpa, eager, ...")
    gradient_checkpointing: Checkpointing = Field(
        "none",
        description="full: activations are computed again in backward. Less memory, about 1/3 slower.",
    )
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model. Off unless trusted.")
