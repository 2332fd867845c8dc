"""The trackers of the core, as plugins of the same kind as any other."""

from __future__ import annotations

from collie_core.hookspecs import Component

CSV = Component(
    build="collie_core.report.csv:CsvFile",
    config="collie_core.config.report:CsvConfig",
    summary="metrics.csv in the run directory",
)
MLFLOW = Component(
    build="collie_core.report.mlflow:MlflowTracker",
    config="collie_core.config.report:MlflowConfig",
    summary="a run of MLflow",
    hint="pip install 'collie-core[mlflow]'",
)
TENSORBOARD = Component(
    build="collie_core.report.tensorboard:TensorBoardReporter",
    config="collie_core.config.report:TensorBoardConfig",
    summary="TensorBoard events in the run directory",
    hint="pip install 'collie-core[tensorboard]'",
)
WANDB = Component(
    build="collie_core.report.wandb:WandbTracker",
    config="collie_core.config.report:WandbConfig",
    summary="a run of Weights & Biases",
    hint="pip install 'collie-core[wandb]'",
)
