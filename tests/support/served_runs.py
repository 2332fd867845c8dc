"""Runs with a server beside them, that last as long as somebody asks."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from runs import changed, sections_on

from collie_core.api import Run, RunConfig

SERVER = {"type": "http", "port": 0, "train_share": 0.9, "max_batch_size": 64, "compare": "base"}


class Crowd:
    """Asks in threads of its own while the run goes on, and ends the run when everybody has got an answer."""

    def __init__(self, scenario: Callable[[str], Any]) -> None:
        self.scenario = scenario
        self.pool = ThreadPoolExecutor(1)

    def collie_run_start(self, run: Run) -> None:
        self.result = self.pool.submit(self.scenario, run.facts["server"])

    def collie_after_step(self, run: Run) -> None:
        if self.result.done():
            run.request_stop()


def long_run(model: Path, data: Path, output: Path, *, lr: float = 1e-30, **server: Any) -> RunConfig:
    """A run whose weights stay what they are to the last bit, so that answers can be known beforehand."""
    sections = sections_on("tp1", model, data, output, steps=100_000, micro_batch=4)
    return RunConfig(**changed(sections, {"optimizer.type": "sgd", "optimizer.lr": lr}), server=SERVER | server)
