"""TensorBoard events, when `report_to` asks for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from collie_core.hookspecs import Run
from collie_core.plugins import hookimpl
from collie_core.report.rundir import TENSORBOARD
from collie_core.report.trackers import required, scalars

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardReporter:
    """Writes scalars into `<output_dir>/tensorboard`: `train/loss`, `eval/perplexity`, ...

    Raises:
        RunError: tensorboard is not installed.
    """

    def __init__(self) -> None:
        required("torch.utils.tensorboard", "tensorboard")
        self._writer: SummaryWriter | None = None  # open between run start and run end

    @hookimpl
    def collie_run_start(self, run: Run) -> None:
        """Open the event file and record the configuration."""
        from torch.utils.tensorboard import SummaryWriter

        resumed = run.step + 1 if run.step else None  # what was recorded from there on is hidden
        self._writer = SummaryWriter(str(run.output_dir / TENSORBOARD), purge_step=resumed)
        self._writer.add_text("config", f"```yaml\n{run.config.to_yaml()}\n```", 0)

    @hookimpl
    def collie_metrics(self, run: Run, values: Mapping[str, Any]) -> None:
        """Record the numbers of a step."""
        self._write(values, run.step)

    @hookimpl
    def collie_evaluated(self, run: Run, results: Mapping[str, float]) -> None:
        """Record the results of an evaluation."""
        self._write(results, run.step)

    @hookimpl
    def collie_run_end(self, run: Run) -> None:
        """Write out what is still buffered and close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self, numbers: Mapping[str, Any], step: int) -> None:
        if self._writer is None:
            return
        for name, value in scalars(numbers).items():
            self._writer.add_scalar(name, value, step)
