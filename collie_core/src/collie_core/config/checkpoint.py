"""`checkpoint:`"""

from __future__ import annotations

from pydantic import Field, PositiveInt

from collie_core.config.base import ConfigModel


class CheckpointConfig(ConfigModel):
    """What a run goes on from, after it has ended or was ended."""

    save_steps: PositiveInt | None = Field(
        None,
        description="Steps between checkpoints; one more at the end, and at SIGTERM and SIGUSR1. null: there are none.",
    )
    save_total_limit: PositiveInt | None = Field(
        None, description="So many checkpoints are kept, the newest ones; null: all."
    )
    resume_from_checkpoint: str | None = Field(
        None,
        min_length=1,
        description="auto: go on from the newest sound checkpoint in train.output_dir, or begin where there is none. "
        "Else the folder of a checkpoint, or of a run that has some. null: begin.",
    )
