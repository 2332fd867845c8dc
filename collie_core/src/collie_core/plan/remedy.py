"""What would make a run fit: changes that keep what is trained and how many samples a step has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from collie_core.errors import CollieError
from collie_core.plan.children import Killed
from collie_core.plan.plan import Plan, Shape, make_plan

if TYPE_CHECKING:
    from collie_core.config.run import RunConfig

Changes = dict[str, str | int]
"""Values by dotted key of the configuration."""

Load = Callable[[Mapping[str, str | int]], "RunConfig"]
"""The configuration of the run with changes; raises a `CollieError` when that is refused."""


@dataclass(frozen=True)
class Remedy:
    """Changes with which a run fits, and its plan then."""

    changes: Changes
    plan: Plan

    @property
    def overrides(self) -> list[str]:
        """As the command line takes them."""
        return [f"{key}={value}" for key, value in self.changes.items()]


def find_remedy(load: Load, processes: int, memory: int, *, gpu: bool) -> Remedy | None:
    """The first of `LADDER`, each taken with those before it, with which the largest rank fits; None: not even all.

    Args:
        load: gives the configuration.
        processes, gpu: see `make_plan`.
        memory: bytes of each device.

    Raises:
        CollieError: the run as it is cannot be.
        Killed: a plan was not found out.
    """
    changes: Changes = {}
    config = load(changes)
    for step in LADDER:
        more = step(config, Shape.of(config, processes))
        if not more:
            continue
        try:
            changed = load(changes | more)
            plan = make_plan(changed, processes, gpu=gpu)
        except Killed:
            raise
        except CollieError:  # what is refused is no way out; the next may be
            continue
        changes, config = changes | more, changed
        if plan.largest.predicted <= memory:
            return Remedy(changes, plan)
    return None


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


LADDER = (_checkpointing, _smallest_micro_batch, _shared_parameters, *3 * (_twice_the_tensor_parallelism,))
"""From what costs the least time to what costs the most."""
