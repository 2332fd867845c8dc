"""What every optimizer is given: parameter groups, and a schedule over its learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import nn

from collie_core.errors import RunError
from collie_core.model.adapters import UNUSED

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from collie_core.config.base import OptimizerConfig, ParamGroup
    from collie_core.config.optimizer import LRSchedulerConfig
    from collie_core.topology import Topology

HIDDEN, OTHER = "hidden", "other"
"""Roles: the matrices of hidden layers; embeddings, the head, and whatever is no matrix."""


def parameter_groups(
    model: nn.Module, section: OptimizerConfig, topology: Topology, *, roles: bool = False
) -> list[dict[str, Any]]:
    """Every trainable parameter in one torch parameter group. Collective.

    The first pattern of `section.param_groups` that matches the name decides its options. Unless that says otherwise,
    matrices and embeddings decay and vectors (norms, biases) do not. Groups by patterns stand last. With `roles` each
    group has a `role`, and its parameters are of one.

    Raises:
        RunError: nothing is trainable, or a pattern is left without a parameter.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise RunError("the model has no trainable parameter")
    patterns = section.param_groups
    numbers = {name: _first_match(name, patterns) for name in trainable}
    _require_matches(patterns, numbers, topology)
    kept = _no_hidden_matrices(model) if roles else set()
    groups: dict[tuple[int, float, str], dict[str, Any]] = {}
    for name, parameter in trainable.items():
        number = numbers[name]
        dimensions = _dimensions(parameter)
        options: dict[str, Any] = {"weight_decay": section.weight_decay if dimensions >= 2 else 0.0}
        options |= patterns[number].options if number < len(patterns) else {}
        role = HIDDEN if dimensions == 2 and id(parameter) not in kept else OTHER
        if roles:
            options["role"] = role
        key = (-number, -options["weight_decay"], role if roles else "")
        groups.setdefault(key, {"params": [], **options})["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def with_equal_number(groups: list[dict[str, Any]], model: nn.Module, topology: Topology) -> list[dict[str, Any]]:
    """As many groups on every rank of a copy of the model, since DeepSpeed exchanges the norm of each. Collective.

    A stage may have fewer: patterns name layers, and an adapter may have its vectors on one stage alone. Groups of a
    parameter that nothing depends on make up for them; which norms meet in the sum of all is the same.
    """
    device = groups[0]["params"][0].device
    most = torch.tensor(len(groups), device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=topology.model.group)
    for number in range(int(most) - len(groups)):
        nothing = nn.Parameter(groups[0]["params"][0].new_zeros(1))
        model.register_parameter(f"{UNUSED}_group{number}", nothing)
        groups.append({**groups[0], "params": [nothing]})
    return groups


def _first_match(name: str, patterns: Sequence[ParamGroup]) -> int:
    """The number of the first pattern that matches; the number of patterns when none does."""
    matching = (number for number, group in enumerate(patterns) if fnmatchcase(name, group.match))
    return next(matching, len(patterns))


def _require_matches(patterns: Sequence[ParamGroup], numbers: dict[str, int], topology: Topology) -> None:
    """Every pattern decides about a parameter of the model, on whatever rank that is."""
    if not patterns:
        return
    everywhere = {name: number for found in topology.gather_objects(numbers) for name, number in found.items()}
    for number, group in enumerate(patterns):
        if number in everywhere.values():
            continue
        shadowed = [name for name in everywhere if fnmatchcase(name, group.match)]
        reason = (
            f"matches parameters that earlier groups have taken, as {shadowed[0]}; move it up"
            if shadowed
            else f"matches no trainable parameter; their names are like {next(iter(everywhere))}"
        )
        raise RunError(f"optimizer.param_groups.{number}.match={group.match!r} {reason}")


def _no_hidden_matrices(model: nn.Module) -> set[int]:
    """The matrices at the ends of a model: embeddings, and the output head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    ends = [module for module in model.modules() if isinstance(module, nn.Embedding) or module is head]
    return {id(parameter) for module in ends for parameter in module.parameters(recurse=False)}


def _dimensions(parameter: nn.Parameter) -> int:
    """Also of a parameter that ZeRO-3 has taken apart, which leaves an empty vector behind."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def schedule(section: LRSchedulerConfig, optimizer: Optimizer, max_steps: int) -> LRScheduler:
    """The schedule of the transformers library over `max_steps` optimizer steps, warm-up first."""
    from transformers import get_scheduler

    warmup = section.warmup_steps if section.warmup_steps else math.ceil(section.warmup_ratio * max_steps)
    name = "constant_with_warmup" if section.type == "constant" and warmup else section.type
    return cast("LRScheduler", get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=max_steps))
