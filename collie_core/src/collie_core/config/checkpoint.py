"""`checkpoint:`"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, field_validator

from collie_core.config.base import ConfigModel
from collie_core.storage import is_url


class CheckpointConfig(ConfigModel):
    """What a run goes on from, after it has ended or was ended."""

    save_steps: PositiveInt | None = Field(
        None,
        description="Steps between checkpoints; one more at the end, and at SIGTERM and SIGUSR1. null: there are none.",
    )
    save_total_limit: PositiveInt | None = Field(
        None, description="So many checkpoints are kept, the newest ones, and that of the best step; null: all."
    )
    asynchronous: bool = Field(
        True,
        description="Write behind the training, from a copy in the main rank's host memory, which keeps room for it. "
        "false: the training waits for the disk.",
    )
    on_error: Literal["stop", "continue"] = Field(
        "stop", description="When a checkpoint cannot be written: stop the run, or say so and train on without it."
    )
    store: str | None = Field(
        None,
        description="An fsspec URL such as s3://bucket/run: checkpoints, and at the end the model, go there as well.",
    )
    resume_from_checkpoint: str | None = Field(
        None,
        min_length=1,
        description="auto: go on from the newest sound checkpoint in train.output_dir, or begin where there is none. "
        "Else the folder or URL of a checkpoint, or of a run that has some. null: begin.",
    )

    @field_validator("store")
    @classmethod
    def _url(cls, value: str | None) -> str | None:
        if value is not None and not is_url(value):
            raise ValueError("must be a URL such as s3://bucket/run; a folder of the machine is train.output_dir")
        return value and value.rstrip("/")
