"""Topologies by name, and the families that are trained on them."""

from __future__ import annotations

import re

FAMILIES = ["llama", "llama_tied", "mistral", "qwen3", "internlm", "internlm2", "internlm3"]


def sizes_of(topology: str) -> dict[str, int]:
    """`tp2pp2dp2zero1` in numbers; `offload1` keeps in host memory what that stage of ZeRO can."""
    found = {name: int(size) for name, size in re.findall(r"([a-z]+)(\d+)", topology)}
    return {"tp": 1, "pp": 1, "dp": 1, "zero": 0, "offload": 0} | found


def world_size_of(topology: str) -> int:
    sizes = sizes_of(topology)
    return sizes["tp"] * sizes["pp"] * sizes["dp"]
