"""Checkpoints: a run that was stopped goes on as if it had not been, on the same topology and on any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from families import write_family
from runs import Record, Sections, changed, largest_difference, sections_on
from topologies import world_size_of

from collie_core.api import RunConfig, Trainer

STEPS, BATCH = 6, 8
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"type": "adamw", "lr": 3e-3, "weight_decay": 0.01},
    "lion": {"type": "lion", "lr": 1e-4},
    "sophia": {"type": "sophia", "lr": 1e-3, "hessian_interval": 2},
    "muon": {"type": "muon", "lr": 1e-2},
    "adalomo": {"type": "adalomo", "lr": 1e-3},
    "sgd": {"type": "sgd", "lr": 1e-2, "momentum": 0.9},
}
LORA = {"type": "lora", "r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["q_proj", "down_proj"]}


class StopAfter(Record):
    """Keeps losses, and ends the run as a crash would."""

    def __init__(self, step: int | None) -> None:
        super().__init__()
        self.step = step

    def collie_before_step(self, run: Any) -> None:
        if run.step == self.step:
            raise Crash


class Crash(Exception):
    """What a run does not expect."""


def sections(
    topology: str, model: Path, data: Path, output: Path, optimizer: str, changes: dict[str, Any] | None = None
) -> Sections:
    """A run with everything that could go wrong: packing, a warm-up, several micro-batches, an epoch that ends."""
    found = sections_on(topology, model, data, output, steps=STEPS, micro_batch=BATCH // 2)
    found["train"] |= {"gradient_accumulation_steps": 2, "overwrite_output_dir": False}
    if optimizer in ("adalomo",):
        found["train"] |= {"gradient_accumulation_steps": 1}
        found["train"]["per_device_train_batch_size"] *= 2
    found["optimizer"] = OPTIMIZERS[optimizer]
    found["checkpoint"] = {"save_steps": 2, "resume_from_checkpoint": "auto"}
    return changed(found, {"data.packing": True, **(changes or {})})


def train(own: Sections, crash_at: int | None = None) -> list[float]:
    """The losses of this process's part of a run."""
    record = StopAfter(crash_at)
    try:
        Trainer(RunConfig(**own), callbacks=[record]).train()
    except Crash:
        assert crash_at is not None
    return record.losses


def legs(plan: list[tuple[str, int | None]], optimizer: str, model: Path, data: Path, output: Path, changes: Any) -> Any:
    """The losses of each leg of a run that changes its topology; all legs have one number of ranks."""
    return [train(sections(topology, model, data, output, optimizer, changes), stop) for topology, stop in plan]
