"""The section `server: {type: http}`, and the options of `collie serve`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from collie_core.api import ComponentConfig


class HttpConfig(ComponentConfig):
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
        None, min_length=1, description="What a client must know. Default: none on this machine, else a new one."
    )
    model_name: str = Field("model", min_length=1, description="What clients call the model.")
    max_batch_size: PositiveInt = Field(32, description="Answers that are generated at the same time.")
    max_queue: int = Field(128, ge=0, description="Answers that may wait for their turn; more are refused for now.")
    max_prompt_tokens: PositiveInt | None = Field(None, description="Default: as long as the model's context.")
    max_new_tokens: PositiveInt = Field(2048, description="The longest answer, and a chat's if it does not say.")
    max_body_bytes: PositiveInt = Field(1_000_000, description="The largest request.")
    timeout: float = Field(300.0, gt=0, description="Seconds after which a request is given up, waiting included.")
