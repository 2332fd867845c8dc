"""The section `server: {type: http}`, and the options of `collie serve`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, field_validator
from pydantic_core import PydanticCustomError

from collie_core.api import ServerConfig

COMPARE = "compare"  # what clients call the model to compare with


class HttpConfig(ServerConfig):
    """Where to listen, who may ask, and how much."""

    type: Literal["http"] = "http"
    host: str = Field(
        "127.0.0.1",
        min_length=1,
        description="The address to listen on; another than this machine's own "
        "(127.0.0.1, ::1, localhost) asks everybody for the token.",
    )
    port: int = Field(8000, ge=0, le=65535, description="0: any free one.")
    token: str | None = Field(
        None,
        min_length=1,
        description="What a client must know. Default: the variable COLLIE_TOKEN; without it, none on this machine and "
        "a new one elsewhere.",
    )
    model_name: str = Field("model", min_length=1, description="What clients call the model.")
    max_prompt_tokens: PositiveInt | None = Field(None, description="Default: as long as the model's context.")
    max_new_tokens: PositiveInt = Field(2048, description="The longest answer, and a chat's if it does not say.")
    max_body_bytes: PositiveInt = Field(1_000_000, description="The largest request.")
    timeout: float = Field(300.0, gt=0, description="Seconds after which a request is given up, waiting included.")

    @field_validator("model_name")
    @classmethod
    def _not_the_other(cls, value: str) -> str:
        if value == COMPARE:
            raise PydanticCustomError("taken", "must not be compare: clients call the model to compare with so")
        return value
