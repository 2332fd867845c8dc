"""`model:`"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from collie_core.config.base import ConfigModel, PlainMapping


def _checkpointing(value: Any) -> Any:
    return {True: "full", False: "none"}[value] if isinstance(value, bool) else value


def _each_once(tokens: list[str]) -> list[str]:
    if twice := [token for token, count in Counter(tokens).items() if count > 1]:
        raise ValueError(f"must name each token once, and there is more than one {twice[0]!r}")
    return tokens


Checkpointing = Annotated[
    Literal["none", "full"],
    BeforeValidator(_checkpointing, json_schema_input_type=Literal["none", "full"] | bool),
]


class ResizeVocabulary(ConfigModel):
    """New tokens, and rows for them in the matrices of pretrained weights. Nothing is ever cut off."""

    tokens: Annotated[list[Annotated[str, Field(min_length=1)]], AfterValidator(_each_once)] = Field(
        [], description="Texts that the tokenizer is to take as one token each; it has none of them yet."
    )
    size: int | None = Field(
        None,
        ge=1,
        description="Rows of the input embedding and the output head; default: as many as the files have, or as the "
        "tokenizer needs if that is more.",
    )
    multiple_of: int = Field(
        1, ge=1, description="Rows are added up to the next multiple of it, e.g. 64 for fast matrix products."
    )
    init: Literal["pieces", "mean"] = Field(
        "pieces",
        description="First values of a new token's row. pieces: the mean of the rows of the tokens that its text was "
        "cut into before. mean: the mean of the rows of all tokens, as added rows without a token have it in any case.",
    )


class ModelConfig(ConfigModel):
    """The model: pretrained weights, or an architecture to train from random ones."""

    model_name_or_path: str | None = Field(None, min_length=1, description="A folder, URL or hub id, with its weights.")
    config: PlainMapping | None = Field(
        None,
        description="Train from random weights: `model_type` and the fields of its transformers config. "
        "A missing vocab_size is the tokenizer's.",
    )
    resize_vocabulary: ResizeVocabulary | None = Field(None, description="New tokens, and room for them.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Precision of forward and backward. auto: bfloat16 where the GPU has it, float32 on CPU.",
    )
    attn_implementation: str | None = Field(
        None,
        min_length=1,
        description="Attention kernels: sdpa, eager, ... Default: sdpa, or eager where the model has no sdpa.",
    )
    gradient_checkpointing: Checkpointing = Field(
        "none",
        description="full: activations are computed again in backward. Less memory, about 1/3 slower.",
    )
    quantization: Literal["int8", "nf4", "fp4"] | None = Field(
        None, description="Frozen weights in 8 or 4 bits under an adapter, on a CUDA device; needs bitsandbytes."
    )
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model. Off unless trusted.")
