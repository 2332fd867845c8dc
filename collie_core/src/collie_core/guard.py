"""What a run does about a step whose numbers are none, or whose loss jumps: stop, leave it out, or undo."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from collie_core.errors import NotANumber

if TYPE_CHECKING:
    from collie_core.checkpoint.run import Checkpoints
    from collie_core.config.train import TrainConfig
    from collie_core.engine.step import Step
    from collie_core.hookspecs import Run

IN_A_ROW = 10  # steps that may be left out one after the other
REWINDS = 3  # to one checkpoint
RECENT, ENOUGH = 50, 10  # losses whose mean a jump is measured by, and how many of them it takes

logger = logging.getLogger("collie")


class Guard:
    """Follows the steps of a run. All ranks decide alike: they see the same loss and the same norm.

    Args:
        section: `train:`.
        run: of this process.
        step: whose gradients are dropped when a loss jumps.
        checkpoints: to go back to.
    """

    def __init__(self, section: TrainConfig, run: Run, step: Step, checkpoints: Checkpoints) -> None:
        self.section, self.run, self.step, self.checkpoints = section, run, step, checkpoints
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._lost = 0  # steps without an update
        self._in_a_row = 0
        self._rewinds: dict[str, int] = {}  # checkpoint -> times

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside is one step. One that is left out ends early, without an error.

        Raises:
            NotANumber: the run is to stop.
        """
        try:
            yield
        except NotANumber as error:
            self._lost += 1
            self._in_a_row += 1
            self._react(error)
        else:
            self._in_a_row = 0
        if self._lost:
            self.run.metrics["lost_steps"] = float(self._lost)

    def look_at(self, loss: Tensor) -> None:
        """Before the update: does the loss jump?

        Raises:
            NotANumber: it does.
        """
        if (factor := self.section.spike_factor) is None:
            return
        value = loss.item()
        usual = sum(self._recent) / len(self._recent) if self._recent else math.inf
        if len(self._recent) >= ENOUGH and value > factor * usual:
            self.step.discard()
            raise NotANumber(
                f"the loss is {value:.6g}, and was {usual:.6g} on average (train.spike_factor={factor:g}): the update "
                "was not applied"
            )
        if math.isfinite(value):
            self._recent.append(value)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"recent": list(self._recent), "lost": self._lost, "in_a_row": self._in_a_row}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with what `state` gave."""
        self._recent.extend(state["recent"])
        self._lost, self._in_a_row = state["lost"], state["in_a_row"]

    def _react(self, error: NotANumber) -> None:
        if self.section.on_nan == "stop" or (error.damaged and self.section.on_nan == "skip"):
            raise error
        if self._in_a_row >= IN_A_ROW:
            raise NotANumber(f"{self._in_a_row} steps in a row had to be left out, so the run stops: {error}")
        if self.section.on_nan == "skip":
            self._say(f"step {self.run.step + 1} is left out: {error}")
            return
        source = self.checkpoints.go_back()
        if source is None:
            raise NotANumber(f"there is no checkpoint to go back to: {error}")
        times = self._rewinds[source.name] = self._rewinds.get(source.name, 0) + 1
        if times > REWINDS:
            raise NotANumber(f"the run has gone back to {source.name} {REWINDS} times, so it stops: {error}")
        self._say(f"step {self.run.step + 1} is left out, and the weights are those of {source.name} again: {error}")

    def _say(self, text: str) -> None:
        if self.run.topology.is_main:
            logger.warning("%s", text)
