"""A short run on a topology, by its name, and what came out of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from topologies import sizes_of
from torch import Tensor

from collie_core.api import RunConfig, Trainer

Sections = dict[str, dict[str, Any]]


class Record:
    """A callback that keeps loss and gradient norm of every step, and the facts."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.facts: dict[str, Any] = {}

    def collie_run_start(self, run: Any) -> None:
        self.facts = dict(run.facts)

    def collie_after_step(self, loss: Tensor) -> None:
        self.losses.append(loss.item())

    def collie_metrics(self, values: Any) -> None:
        self.norms.append(values["grad_norm"])


def sections_on(topology: str, model: Path, data: Path, output: Path, *, steps: int, micro_batch: int) -> Sections:
    """`steps` steps of `micro_batch` samples over all data-parallel ranks, with clipping and a warm-up."""
    sizes = sizes_of(topology)
    return {
        "model": {"model_name_or_path": str(model)},
        "data": {"train": str(data), "max_length": 256, "cache_dir": str(output / "cache")},
        "parallel": {
            "tensor_parallel_size": sizes["tp"],
            "pipeline_parallel_size": sizes["pp"],
            "zero_stage": sizes["zero"],
            "offload_optimizer": bool(sizes["offload"]),
            "offload_param": bool(sizes["offload"]) and sizes["zero"] == 3,
        },
        "train": {
            "max_steps": steps,
            "per_device_train_batch_size": micro_batch // sizes["dp"],
            "seed": 7,
            "output_dir": str(output / "run"),
            "overwrite_output_dir": True,
        },
        "lr_scheduler": {"type": "cosine", "warmup_ratio": 0.1},
    }


def changed(sections: Sections, changes: dict[str, Any]) -> Sections:
    """With `changes` laid over it, by dotted keys."""
    for key, value in changes.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    return sections


def train(sections: Sections) -> Record:
    """This rank's part of the run."""
    record = Record()
    Trainer(RunConfig(**sections), callbacks=[record], observers=()).train()
    return record


def largest_difference(first: list[float], second: list[float]) -> float:
    """Of two lists of losses, or of norms."""
    assert len(first) == len(second) > 2
    return max(abs(one - other) for one, other in zip(first, second, strict=True))
