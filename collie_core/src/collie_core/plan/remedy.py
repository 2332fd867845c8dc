"""What would make a run fit: changes that keep what is trained and how many samples a step has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from collie_core.errors import CollieError
from collie_core.plan.children import Killed
from collie_core.plan.plan import Plan, Shape, make_plan, passes_at_least

if TYPE_CHECKING:
    from collie_core.config.run import RunConfig

Changes = dict[str, str | int]
"""Values by dotted key of the configuration."""

Load = Callable[[Mapping[str, str | int]], "RunConfig"]
"""The configuration of the run with changes; raises a `CollieError` when that is refused."""

Step = Callable[["RunConfig", Shape], Changes]
"""What a run of so many processes would change; nothing: it is so already, or cannot be."""


@dataclass(frozen=True)
class Remedy:
    """Changes with which a run fits, and its plan then."""

    changes: Changes
    plan: Plan

    @property
    def overrides(self) -> list[str]:
        """As the command line takes them."""
        return [f"{key}={value}" for key, value in self.changes.items()]


def find_remedy(load: Load, processes: int, fits: Callable[[Plan], bool], *, gpu: bool) -> Remedy | None:
    """The first step of `ladder`, each taken with those before it, with which the run fits; None: not even all.

    Args:
        load: gives the configuration.
        processes, gpu: see `make_plan`.
        fits: whether there is room for a plan.

    Raises:
        CollieError: the run as it is cannot be.
        Killed: a plan was not found out.
    """
    changes: Changes = {}
    config = load(changes)
    for step in ladder(gpu=gpu):
        more = step(config, Shape.of(config, processes))
        if not more:
            continue
        try:
            changed = load(changes | more)
            plan = _fitting(changed, processes, fits, gpu=gpu)
        except Killed:
            raise
        except CollieError:  # what is refused is no way out; the next may be
            continue
        changes, config = changes | more, changed
        if plan is not None:
            return Remedy(changes, plan)
    return None


def _fitting(config: RunConfig, processes: int, fits: Callable[[Plan], bool], *, gpu: bool) -> Plan | None:
    """The plan of a run, if it fits."""
    least = passes_at_least(config, processes, gpu=gpu)
    if least is not None and not fits(least):
        return None
    plan = make_plan(config, processes, gpu=gpu)
    return plan if fits(plan) else None


def _checkpointing(config: RunConfig, shape: Shape) -> Changes:
    return {} if config.model.gradient_checkpointing == "full" else {"model.gradient_checkpointing": "full"}


def _smallest_micro_batch(config: RunConfig, shape: Shape) -> Changes:
    sizes = config.batch_sizes(shape.dp)
    if sizes.per_device == 1:
        return {}
    steps = sizes.per_device * sizes.accumulation
    return {"train.per_device_train_batch_size": 1, "train.gradient_accumulation_steps": steps}


def _shared_parameters(config: RunConfig, shape: Shape) -> Changes:
    return {} if shape.dp == 1 or config.parallel.zero_stage == 3 else {"parallel.zero_stage": 3}


def _twice_the_tensor_parallelism(config: RunConfig, shape: Shape) -> Changes:
    if shape.dp % 2:
        return {}
    steps = 2 * config.batch_sizes(shape.dp).accumulation
    return {
        "parallel.tensor_parallel_size": 2 * shape.tp,
        "parallel.data_parallel_size": shape.dp // 2,
        "train.gradient_accumulation_steps": steps,
    }


def _offloaded_optimizer(config: RunConfig, shape: Shape) -> Changes:
    if config.parallel.offload_optimizer:
        return {}
    return {"parallel.zero_stage": max(2, config.parallel.zero_stage), "parallel.offload_optimizer": "true"}


def _offloaded_parameters(config: RunConfig, shape: Shape) -> Changes:
    return {} if config.parallel.offload_param else {"parallel.zero_stage": 3, "parallel.offload_param": "true"}


def ladder(*, gpu: bool) -> tuple[Step, ...]:
    """What makes a run smaller, from what costs the least time to what costs the most."""
    steps = _checkpointing, _smallest_micro_batch, _shared_parameters, *3 * (_twice_the_tensor_parallelism,)
    return (*steps, _offloaded_optimizer, _offloaded_parameters) if gpu else steps
