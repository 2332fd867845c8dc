"""MLflow, when `report_to` asks for it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from collie_core.hookspecs import Run
from collie_core.plugins import hookimpl
from collie_core.report.trackers import required, scalars

BATCH = 100  # parameters that a server takes at once


class MlflowTracker:
    """Sends the configuration as parameters, and every logged number, to a run of its own.

    It uses a client and not `mlflow.start_run`, whose active run would be that of the whole process.

    Raises:
        RunError: mlflow is not installed.
    """

    def __init__(self, tracking_uri: str | None, experiment: str, run_name: str | None) -> None:
        self._mlflow = required("mlflow", "mlflow")
        self._entities = required("mlflow.entities", "mlflow")
        self._tracking_uri = tracking_uri
        self._experiment = experiment
        self._run_name = run_name
        self._client: Any = None
        self._run_id = ""  # between run start and run end

    @hookimpl
    def collie_run_start(self, run: Run) -> None:
        """Begin the run."""
        self._client = client = self._mlflow.MlflowClient(tracking_uri=self._tracking_uri)
        found = client.get_experiment_by_name(self._experiment)
        experiment = client.create_experiment(self._experiment) if found is None else found.experiment_id
        self._run_id = client.create_run(experiment, run_name=self._run_name or run.output_dir.name).info.run_id
        written = list(_flat(run.config.model_dump(mode="json")))
        for start in range(0, len(written), BATCH):
            params = [self._entities.Param(name, value) for name, value in written[start : start + BATCH]]
            client.log_batch(self._run_id, params=params)

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
        """End the run, as finished or failed."""
        if self._run_id:
            for name, value in run.best.items():
                self._client.set_tag(self._run_id, f"best.{name}", value)
            self._client.set_terminated(self._run_id, status="FINISHED" if error is None else "FAILED")
            self._run_id = ""

    def _log(self, values: Mapping[str, Any], step: int) -> None:
        if self._run_id:
            now = round(time.time() * 1000)  # ms
            metrics = [self._entities.Metric(name, value, now, step) for name, value in scalars(values).items()]
            self._client.log_batch(self._run_id, metrics=metrics)


def _flat(value: object, key: str = "") -> Iterator[tuple[str, str]]:
    """What was set, by dotted keys."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _flat(item, f"{key}.{name}" if key else str(name))
    elif value is not None:
        yield key, str(value)
