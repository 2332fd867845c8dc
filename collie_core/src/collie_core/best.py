"""The best model of a run: which evaluation was best, the weights it measured, and when to stop waiting for another."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collie_core.errors import RunError
from collie_core.report.rundir import BEST, BEST_FACTS, write_json

if TYPE_CHECKING:
    from collie_core.config.evaluation import BestConfig, Mode
    from collie_core.hookspecs import Run

Export = Callable[[Path, Callable[[Path], None]], object]
"""(folder, what else to write into it) exports the model of the run there, whole or not at all. Collective."""


def improves(value: float, on: float | None, mode: Mode, by: float = 0.0) -> bool:
    """Whether `value` is better than `on` by more than `by`; None: there is none yet. A tie is no improvement.

    A value that is not finite never improves, and anything that is finite improves on nothing.
    """
    if not math.isfinite(value):
        return False
    return on is None or (on - value if mode == "min" else value - on) > by


class BestModel:
    """Follows the evaluations of a run. The main rank decides, and every rank acts alike.

    Args:
        section: `evaluation.best`; None: nothing is kept.
        run: gets `best`, and is asked to stop when patience is at its end.
        export: how the model is written.

    Raises:
        RunError: nothing says which direction is better.
    """

    def __init__(self, section: BestConfig | None, run: Run, export: Export) -> None:
        self.section = section
        self.mode: Mode = "min" if section is None else _mode_of(section, run)
        self.run = run
        self.export = export
        self._reference: float | None = None  # what the next evaluations have to beat, for patience
        self._waited = 0  # evaluations since then

    def evaluated(self, results: Mapping[str, float]) -> None:
        """Keep the model when these results are the best so far. Collective; also shares a hook's wish to stop.

        Raises:
            RunError: the metric is not among the results.
        """
        run = self.run
        error, improved, best, reason = run.topology.gather_objects(self._decide(results))[0]
        if error:
            raise RunError(error)
        run.best, run.stop_reason = best, reason
        if improved:
            self.export(run.output_dir / BEST, lambda folder: write_json(folder / BEST_FACTS, best))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"best": self.run.best, "reference": self._reference, "waited": self._waited}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with what `state` gave."""
        self.run.best = dict(state["best"])
        self._reference, self._waited = state["reference"], state["waited"]

    def _decide(self, results: Mapping[str, float]) -> tuple[str, bool, dict[str, Any], str]:
        """What is wrong, whether these results are the best so far, the best so far, and why to stop."""
        run, section = self.run, self.section
        if section is None:
            return "", False, run.best, run.stop_reason
        if section.metric not in results:
            return _unknown(section.metric, results), False, run.best, run.stop_reason
        value = float(results[section.metric])
        improved = improves(value, run.best.get("value"), self.mode)
        best = run.best
        if improved:
            best = {"step": run.step, "epoch": run.epoch, "metric": section.metric, "value": value}
        return "", improved, best, run.stop_reason or self._out_of_patience(section, value, best)

    def _out_of_patience(self, section: BestConfig, value: float, best: Mapping[str, Any]) -> str:
        """Why to stop; "" while there is patience. The base model before the first step counts as an evaluation."""
        if improves(value, self._reference, self.mode, section.min_delta):
            self._reference, self._waited = value, 0
        else:
            self._waited += 1
        ends_anyway = self.run.step >= self.run.max_steps
        if section.patience is None or self._waited < section.patience or ends_anyway:
            return ""
        evaluations = "one evaluation" if self._waited == 1 else f"{self._waited} evaluations"
        known = f"; the best, {best['value']:.6g}, was at step {best['step']}" if best else ""
        return f"{section.metric} did not improve for {evaluations}{known}"


def _mode_of(section: BestConfig, run: Run) -> Mode:
    known: Mapping[str, Mode] = run.facts.get("better", {})
    mode = section.mode or known.get(section.metric)
    if mode is None:
        raise RunError(
            f"evaluation.best.metric={section.metric}: whether less or more of it is better is known for "
            f"{', '.join(known) or 'no result'} alone; set evaluation.best.mode to min or max"
        )
    return mode


def _unknown(metric: str, results: Mapping[str, float]) -> str:
    known = f"the evaluation gives {', '.join(sorted(results))}" if results else "the evaluation gives nothing"
    return f"evaluation.best.metric={metric}: no such result; {known}"
