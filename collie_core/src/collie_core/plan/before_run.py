"""The plan of a run that is about to start: said before the first step, kept beside its record, and heeded.

The main rank plans for all, before there is a process group, beside which nothing can be forked. The others wait for
it, and what it refuses ends them as any failure of a rank does.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from collie_core.config.run import RunConfig
from collie_core.errors import CollieError, RunError
from collie_core.model.build import compute_dtype
from collie_core.plan.plan import Plan, as_object, make_plan
from collie_core.plan.remedy import find_remedy
from collie_core.plan.room import Room
from collie_core.plan.show import remedy_text
from collie_core.plugins import hookimpl
from collie_core.report import text
from collie_core.report.meter import peak_memory_bytes
from collie_core.report.rundir import PLAN, write_json
from collie_core.watch import reached_by_main

if TYPE_CHECKING:
    from collie_core.hookspecs import Run
    from collie_core.plan.trace import Peak

SAID = 0.01  # of the peak, below which a component is not mentioned

logger = logging.getLogger("collie")


class PlanOfRun:
    """A callback that shows the plan with the other facts of the run, and writes it to plan.json; there, when the run
    has ended, also what its main rank has held.

    Args:
        sentence: the plan, or why there is none.
        plan: as `collie plan --json` gives it; empty: there is none.
    """

    def __init__(self, sentence: str, plan: Mapping[str, Any]) -> None:
        self.sentence = sentence
        self.plan = dict(plan)

    @hookimpl(tryfirst=True)
    def collie_run_start(self, run: Run) -> None:
        """Before the facts are shown."""
        run.facts["memory"] = self.sentence
        if self.plan:
            write_json(run.output_dir / PLAN, self.plan)

    @hookimpl
    def collie_run_end(self, run: Run) -> None:
        """How a run ended is not hidden behind a disk that is full."""
        device = run.topology.device
        # On a CPU libraries and data count too, and are no part of the prediction.
        kind = "allocated" if device.type == "cuda" else "resident"
        if self.plan:
            try:
                write_json(run.output_dir / PLAN, self.plan | {f"rank_0_{kind}_peak_bytes": peak_memory_bytes(device)})
            except OSError as failed:
                logger.warning("%s does not say what was held: %s", run.output_dir / PLAN, failed.strerror)


def plan_before_run(config: RunConfig, *, force: bool) -> list[PlanOfRun]:
    """Callbacks for the `Trainer` that will run in this process: the plan, on the main rank.

    Args:
        config: of the run.
        force: whether a run that does not fit starts all the same.

    Raises:
        RunError: it does not fit; says by how much, and what would make it fit.
    """
    found = [_plan_here(config, force=force)] if os.environ.get("RANK", "0") == "0" else []
    reached_by_main("plan")
    return found


def _plan_here(config: RunConfig, *, force: bool) -> PlanOfRun:
    import transformers.optimization  # noqa: F401  (the run needs it, and it loads peft, as plans of adapters would)

    room, processes = Room.here(), int(os.environ.get("WORLD_SIZE", "1"))
    config = with_precision(config, gpu=bool(room.gpu))
    try:
        plan = make_plan(config, processes, gpu=bool(room.gpu))
    except (CollieError, RuntimeError) as error:  # a run that can be need not be one that can be planned
        return PlanOfRun(f"not planned: {str(error).splitlines()[-1]}", {})
    sentence = sentence_of(plan, room)
    if not room.holds(plan):
        if not force:
            raise RunError(_refusal(config, plan, room))
        sentence += ", which does not fit; started by --force"
    return PlanOfRun(sentence, as_object(plan, None) | {"memory_bytes": room.nbytes, "ranks_sharing_it": room.ranks})


def with_precision(config: RunConfig, *, gpu: bool) -> RunConfig:
    """With the precision that `model.dtype: auto` means on this machine."""
    dtype = compute_dtype(config.model.dtype, torch.device("cuda" if gpu else "cpu"))
    model = config.model.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})
    return config.model_copy(update={"model": model})


def changed(config: RunConfig, changes: Mapping[str, str | int]) -> RunConfig:
    """With other values, by dotted key.

    Raises:
        ConfigError: they are refused.
    """
    overrides = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    return RunConfig.from_text(config.to_yaml(), overrides, name="the configuration")


def sentence_of(plan: Plan, room: Room) -> str:
    """What is needed of what is there, and for what."""
    needed, there = text.memory(room.needed(plan.predicted)), text.memory(room.nbytes)
    peak = plan.largest.prediction.peak
    if room.ranks == 1:
        offloaded = f"; {_of_host(plan, room.host)}" if plan.offloads and room.host is not None else ""
        return f"{needed} of {there} at the peak, in {peak.phase}: {components_text(peak)}{offloaded}"
    most = f"{text.memory(peak.total)} on one rank, in {peak.phase}: {components_text(peak)}"
    return f"{needed} of {there} at the peaks of {room.ranks} ranks; {most}"


def _of_host(plan: Plan, room: Room) -> str:
    return f"{text.memory(room.needed(plan.host))} of {text.memory(room.nbytes)} of main memory for what is offloaded"


def components_text(peak: Peak) -> str:
    """Bytes by component, the largest first."""
    found = sorted(peak.components.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {text.memory(nbytes)}" for name, nbytes in found if nbytes > SAID * peak.total)


def _refusal(config: RunConfig, plan: Plan, room: Room) -> str:
    more = text.memory(room.short(plan) or room.host_short(plan))
    full = room if room.short(plan) or room.host is None else room.host
    where = f"the {text.memory(full.nbytes)} of {full.gpu or 'main memory that are free'}"
    processes = plan.shape.processes
    try:
        remedy = find_remedy(lambda changes: changed(config, changes), processes, room.holds, gpu=bool(room.gpu))
        way_out = remedy_text(remedy, processes)
    except CollieError as error:
        way_out = f"what would make it fit is not known: {error}"
    return (
        f"the run does not fit: it would need {more} more than {where}: {sentence_of(plan, room)}\n"
        f"{way_out}\n--force starts it as it is"
    )
