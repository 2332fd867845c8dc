"""Topologies by name, and the families and optimizers that are trained on them."""

from __future__ import annotations

from typing import Any

from collie_testkit import training
from collie_testkit.training import ranks_of as world_size_of

__all__ = ["FAMILIES", "OPTIMIZERS", "sizes_of", "world_size_of"]

FAMILIES = ["llama", "llama_tied", "mistral", "qwen3", "internlm", "internlm2", "internlm3"]
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 1e-3},
    "sgd": {"lr": 0.1, "momentum": 0.9},
    "lion": {"lr": 1e-4},
    "adan": {"lr": 1e-3},
    "sophia": {"lr": 1e-3, "hessian_interval": 5},
    "lomo": {"lr": 0.1},
    "adalomo": {"lr": 1e-2},
    "muon": {"lr": 2e-3, "adamw_lr": 1e-3},
    "normuon": {"lr": 1e-3},
}


def sizes_of(topology: str) -> dict[str, int]:
    """`tp2pp2dp2zero1` in numbers; `offload1` keeps in host memory what that stage of ZeRO can."""
    return {"offload": 0} | training.sizes_of(topology)
