"""Sections of the trackers under `report_to:`. Keys and passwords are the packages' own affair."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from collie_core.config.base import ComponentConfig


class CsvConfig(ComponentConfig):
    """metrics.csv in the run directory."""

    type: Literal["csv"] = Field("csv", description="metrics.csv in the run directory.")


class TensorBoardConfig(ComponentConfig):
    """TensorBoard events in the run directory."""

    type: Literal["tensorboard"] = Field("tensorboard", description="TensorBoard events in the run directory.")


class WandbConfig(ComponentConfig):
    """A run of Weights & Biases. Its files lie in `<output_dir>/wandb`."""

    type: Literal["wandb"] = Field("wandb", description="Weights & Biases.")
    project: str | None = Field(None, min_length=1, description="The project; default: as wandb is set up.")
    entity: str | None = Field(None, min_length=1, description="The user or team; default: as wandb is set up.")
    name: str | None = Field(None, min_length=1, description="The name of the run; default: that of output_dir.")
    tags: list[str] = Field([], description="Tags of the run.")
    mode: Literal["online", "offline"] | None = Field(
        None, description="offline: nothing is sent until `wandb sync`; default: as wandb is set up."
    )


class MlflowConfig(ComponentConfig):
    """A run of MLflow."""

    type: Literal["mlflow"] = Field("mlflow", description="MLflow.")
    tracking_uri: str | None = Field(
        None,
        min_length=1,
        description="A server or database: http://host:5000, sqlite:///runs.db; default: as mlflow is set up.",
    )
    experiment: str = Field("Default", min_length=1, description="The experiment; made when there is none yet.")
    run_name: str | None = Field(None, min_length=1, description="The name of the run; default: that of output_dir.")
