"""Weights & Biases, when `report_to` asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from collie_core.hookspecs import Run
from collie_core.plugins import hookimpl
from collie_core.report.trackers import required, scalars


class WandbTracker:
    """Sends the configuration, every logged number and the best evaluation to a run of its own.

    Args:
        options: what `wandb.init` is given beside the configuration: project, entity, name, tags, mode.

    Raises:
        RunError: wandb is not installed.
    """

    def __init__(self, **options: Any) -> None:
        self._wandb = required("wandb", "wandb")
        self._options = options
        self._run: Any = None  # between run start and run end

    @hookimpl
    def collie_run_start(self, run: Run) -> None:
        """Begin the run."""
        options = {name: value for name, value in self._options.items() if value}
        self._run = self._wandb.init(
            dir=str(run.output_dir),
            config=run.config.model_dump(mode="json"),
            reinit="create_new",  # one of ours: a program that embeds CoLLiE may have a run of its own
            **{"name": run.output_dir.name, **options},
        )

    @hookimpl
    def collie_metrics(self, run: Run, values: Mapping[str, Any]) -> None:
        """Send the numbers of a step."""
        self._log(values, run.step)

    @hookimpl
    def collie_evaluated(self, run: Run, results: Mapping[str, float]) -> None:
        """Send the results of an evaluation; one outside of a run is not part of its record."""
        self._log(results, run.step)

    @hookimpl
    def collie_run_end(self, run: Run, error: BaseException | None) -> None:
        """Send the rest and end the run; one that an error ended is marked as crashed."""
        if self._run is not None:
            self._run.summary.update({f"best/{name}": value for name, value in run.best.items()})
            self._run.finish(exit_code=0 if error is None else 1)
            self._run = None

    def _log(self, values: Mapping[str, Any], step: int) -> None:
        if self._run is not None:
            self._run.log(scalars(values), step=step)
