"""Whether a model can be cut as `parallel:` asks, as far as its config.json says it; without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collie_core.errors import Problem

if TYPE_CHECKING:
    from collie_core.config.model import ModelConfig
    from collie_core.config.parallel import ParallelConfig

_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_KV_HEADS = ("num_key_value_heads", "multi_query_group_num")


def impossible_split(model: ModelConfig, parallel: ParallelConfig) -> list[Problem]:
    """Heads that ranks cannot share evenly, and more stages than layers; with the sizes that would work.

    What config.json leaves to the family's defaults is found when the model is built.
    """
    raw = _raw_config(model)
    problems = []
    heads, layers = _number(raw, _HEADS), _number(raw, _LAYERS)
    tensor_size, stages = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    if heads is not None:
        rule = tensor_size_problem(heads, _number(raw, _KV_HEADS) or heads, tensor_size)
        if rule:
            problems.append(Problem("parallel.tensor_parallel_size", rule, tensor_size))
    if layers is not None and stages > layers:
        rule = f"exceeds the {layers} layers of the model"
        problems.append(Problem("parallel.pipeline_parallel_size", rule, stages, f"Use at most {layers}."))
    cuts = parallel.pipeline_cuts
    if layers is not None and isinstance(cuts, list) and len(cuts) == stages and sum(cuts) != layers:
        problems.append(Problem("parallel.pipeline_cuts", f"must add up to the {layers} layers of the model", cuts))
    return problems


def tensor_size_problem(heads: int, kv_heads: int, size: int) -> str:
    """Why so many ranks cannot share the heads, with the sizes that can; empty when they can."""
    allowed = allowed_tensor_sizes(heads, kv_heads)
    if size in allowed:
        return ""
    shown = f"{heads} attention heads" + (f" with {kv_heads} key-value heads" if kv_heads != heads else "")
    return f"cannot share {shown}; sizes that can: {', '.join(map(str, allowed))}"


def allowed_tensor_sizes(heads: int, kv_heads: int) -> list[int]:
    """The tensor-parallel sizes that share attention heads evenly; fewer key-value heads are copied."""
    return [
        size for size in range(1, heads + 1) if heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)
    ]


def _raw_config(model: ModelConfig) -> Mapping[str, Any]:
    if model.config is not None:
        return model.config
    file = Path(model.model_name_or_path or "") / "config.json"
    try:
        raw = json.loads(file.read_text()) if file.is_file() else {}
    except (OSError, ValueError):  # told with its reason when the model is built
        return {}
    return raw if isinstance(raw, Mapping) else {}


def _number(raw: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    found = (raw.get(name) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), None)
