"""`data:`"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt
from pydantic_core import PydanticCustomError

from collie_core.config.base import ConfigModel, LocalFolder

Format = Literal["auto", "text", "completion", "messages", "tokens"]


class SourceConfig(ConfigModel):
    """One file, here or at a URL, or hub data set."""

    path: str = Field(min_length=1, description="A file (JSONL, JSON, CSV, parquet, text), also by URL, or a hub id.")
    format: Format = Field(
        "auto",
        description="text: {text}. completion: {input, output}. messages: {messages} or {conversations}. "
        "tokens: {input_ids, labels}. auto: by the columns.",
    )
    split: str | None = Field(None, min_length=1, description="Which rows, as in `datasets`: train[:90%].")
    weight: float = Field(1.0, gt=0, le=1000, description="How often each sample is seen per epoch; 0.5: every other.")


def _section(value: Any) -> Any:
    if not isinstance(value, str | Mapping | SourceConfig):
        raise PydanticCustomError("source", "must be a path, a section with `path:`, or a list of these")
    return {"path": value} if isinstance(value, str) else value


def _as_list(value: Any) -> Any:
    """One source may be written without the list, and a source that is only a path without its key."""
    return [_section(item) for item in (value if isinstance(value, list | tuple) else [value])]


Sources = Annotated[
    list[SourceConfig],
    BeforeValidator(_as_list, json_schema_input_type=str | SourceConfig | list[str | SourceConfig]),
]


class DataConfig(ConfigModel):
    """The samples and how they become tokens."""

    train: Sources = Field([], description="A path, a hub id, or a list of {path, format, split, weight}.")
    eval: Sources = Field([], description="Held-out samples, written as `train` is.")
    max_length: PositiveInt = Field(512, ge=2, description="Longest sample, in tokens.")
    packing: bool = Field(
        False, description="Lay several samples into one row of max_length. They do not attend to each other."
    )
    train_on: Literal["auto", "completion", "assistant", "all"] = Field(
        "auto",
        description="Which tokens are targets. auto: the output of {input, output}, the assistant's turns "
        "of a conversation, all of a text.",
    )
    long_samples: Literal["truncate", "split", "drop", "error"] = Field(
        "truncate",
        description="What happens to a sample longer than max_length. truncate: its end is cut off.",
    )
    chat_template: str | None = Field(
        None, min_length=1, description="A Jinja template, or a file with one; default: the tokenizer's."
    )
    cache_dir: LocalFolder | None = Field(None, description="Where tokenised data is kept; default: ~/.cache.")
    num_workers: NonNegativeInt = Field(0, le=1024, description="Processes that prepare batches ahead; 0: none.")
