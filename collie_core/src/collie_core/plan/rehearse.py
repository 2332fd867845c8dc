"""Two optimizer steps of a run on one rank, as the run itself takes them, under a trace of memory.

The micro-batches are full: as many rows as the configuration allows, each of `data.max_length` tokens. So a plan needs
no data, and holds for all batches that the run can meet.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch

from collie_core.data.loader import Batch, StepBatch
from collie_core.engine.step import Step
from collie_core.parts import HandedIn, Parts

if TYPE_CHECKING:
    from collie_core.config.run import RunConfig

Moment = Literal["model", "engine", "gradients", "updated"]
STEPS = 2  # the first makes the state of the optimizer, the second finds it there


class RehearsedParts(Parts):
    """The parts of a run that take their steps on full rows, without looking at data."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config, HandedIn())
        self.will_train = True

    @property
    def max_steps(self) -> int:
        """So many that the schedule has a shape; memory does not depend on it."""
        return self.config.train.max_steps or 1000

    @cached_property
    def step(self) -> Step:
        """The engine, without the proof that packing keeps samples apart."""
        optimizer = self._optimizer()
        return self._engine(optimizer, self._scheduler(optimizer))

    @property
    def differing_micro_batches(self) -> int:
        """After how many all others of a step hold what one before has held.

        The second finds the gradients of the first. A stage has as many open as there are stages.
        """
        return 2 if self.topology.pp.size == 1 else self.topology.pp.size + 1

    def full_batch(self, most: int) -> StepBatch:
        """This rank's share of the largest global batch that can come, or so many micro-batches of it.

        With packing a row holds two samples.
        """
        rows, length = self.micro_batch_size, self.config.data.max_length
        ids = torch.zeros(rows, length, dtype=torch.int64)
        positions = (
            torch.arange(length).remainder(-(-length // 2)).repeat(rows, 1) if self.config.data.packing else None
        )
        layout = tuple(((row, length),) for row in range(rows))
        # Every token but the last of a row is predicted from those before it.
        places = torch.arange(rows * length).view(rows, length)[:, :-1].flatten()
        batch = Batch(ids, ids.clone(), positions, layout, places)
        count = min(self.config.gradient_accumulation_steps(self.topology.dp.size), most)
        return StepBatch([batch] * count, rows * count, rows * count * length, 1.0)


def rehearse(parts: RehearsedParts) -> Iterator[Moment]:
    """Build the engine of a run and take two steps, pausing where something has come to stand.

    "model": the model is on its device, with its adapter. "engine": it is ready for the first step. "gradients": all
    that an update needs is there. "updated": a step has ended.
    """
    _ = parts.model
    yield "model"
    step = parts.step
    yield "engine"
    step.model.train()
    # Of several micro-batches the first step needs one: whatever the others hold, they hold more of in the second.
    alike = not parts.optimizer_can.estimates_curvature  # as that does in the first step alone
    for number in range(STEPS):
        batch = parts.full_batch(1 if number == 0 and alike else parts.differing_micro_batches)
        step.forward_backward(batch, batch.tokens * parts.topology.dp.size)
        yield "gradients"
        step.update()
        yield "updated"
