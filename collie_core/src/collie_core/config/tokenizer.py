"""`tokenizer:`"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from collie_core.config.base import ConfigModel


class TokenizerConfig(ConfigModel):
    """The tokenizer."""

    type: Literal["pretrained", "byte"] = Field(
        "pretrained",
        description="pretrained: from a folder or hub id. byte: one token per byte, needs no file.",
    )
    name_or_path: str | None = Field(None, min_length=1, description="A folder, URL or hub id; default: the model's.")
