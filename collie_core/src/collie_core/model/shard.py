"""Tensor parallelism: the stock model with its modules cut over the ranks of the tensor-parallel axis, in place.

Which parameter is cut how is the plan's matter (`partition.py`); here modules learn to compute with their shares.
`layers.py` has the modules, `blocks.py` what they share, `collectives.py` what they exchange, `vocabulary.py` the loss,
and `sequence.py` the variant in which ranks share the positions too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from collie_core.errors import ModelError
from collie_core.model.blocks import make_blocks, settle_blocks
from collie_core.model.collectives import Shares, gather_from, gathered, total
from collie_core.model.layers import (
    ColumnParallel,
    ExpertsParallel,
    Head,
    RowParallel,
    Shard,
    VocabularyParallel,
    become,
    shard_of,
)
from collie_core.model.partition import COLUMN, EMBEDDING, ROW, pattern
from collie_core.model.sequence import (
    divide_positions,
    gathered_positions,
    partial_parameters,
    sequence_parallel_layers,
)
from collie_core.model.stages import Stub
from collie_core.model.vocabulary import Vocabulary, cross_entropy
from collie_core.model.whole import set_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from collie_core.hookspecs import ModelFamily
    from collie_core.model.partition import Partition, Rule
    from collie_core.topology import Axis, Topology

__all__ = [
    "Vocabulary",
    "cross_entropy",
    "gathered_output",
    "install_gradient_hooks",
    "shard",
    "sharded_logits",
    "vocabulary_of",
]

BETWEEN_WHOLE = ("colwise_rep", "colwise_gather_output", "rowwise_rep", "rowwise_split_input")
"""Styles whose outputs are gathered, or whose inputs are split: their neighbours work with whole tensors."""

PASSIVE = ("local_params", "replicate")
"""Styles that say nothing beyond the rules of the module's parameters."""

INNER_SIZES = ("intermediate_dim", "intermediate_size", "expert_dim")
"""What experts call the dimension that is cut."""


def shard(
    model: PreTrainedModel,
    partition: Partition,
    family: ModelFamily,
    topology: Topology,
    *,
    sequence_parallel: bool = False,
) -> None:
    """Make of a model, or of a stage of it, this rank's share, in place; parameters may be on the meta device.

    Raises:
        ModelError: a module cannot do what the plan asks of it; the message names it.
    """
    axis = topology.tp
    if axis.size == 1:
        return
    modules = dict(model.named_modules())
    _cut_parameters(model, partition, axis)
    for name, style in partition.styles.items():
        if name in modules and not isinstance(modules[name], Stub):
            _apply_style(name, modules[name], style, axis, is_head=name == partition.head)
    _divide_attributes(modules, getattr(family, "divided", {}), axis)
    _divide_groups(modules)
    owned = partition.owned_layers(topology.pp.rank)
    layers = {name: model.base_model.get_submodule(name) for name in (f"{partition.layers}.{n}" for n in owned)}
    if sequence_parallel:
        divide_positions(layers, axis)
    else:
        for layer in layers.values():
            make_blocks(layer, axis, None)


def install_gradient_hooks(model: nn.Module) -> None:
    """Sum over tensor-parallel ranks the gradients of which each has a part only.

    To be called when the model is complete and `requires_grad` is final; again after either has changed. The hooks
    run before gradients are accumulated, so several micro-batches and ZeRO see whole gradients.
    """
    settle_blocks(model)
    for layer in sequence_parallel_layers(model):
        for parameter in partial_parameters(layer):
            _hook(parameter, layer.positions.axis, layer.positions.axis.size)
    for module in model.modules():
        if (facts := shard_of(module)) is None:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if name in facts.rules:
                set_whole(parameter, facts.rules[name], facts.axis)
            if name in facts.partial:
                _hook(parameter, facts.axis, facts.partial[name])


def vocabulary_of(model: nn.Module) -> Vocabulary | None:
    """Which logits this rank's head computes; None when it is whole or on another stage."""
    head = next((module for module in model.modules() if isinstance(module, Head)), None)
    if head is None:
        return None
    ((begin, end),) = head.shares.mine
    return Vocabulary(head.shares.axis, begin, end - begin)


@contextmanager
def sharded_logits(model: nn.Module) -> Iterator[None]:
    """Inside, a sharded head gives this rank's share of the logits, [B, L, V / ranks]; outside, all of them."""
    heads = [module for module in model.modules() if isinstance(module, Head)]
    before = [head.gathers for head in heads]
    for head in heads:
        head.gathers = False
    try:
        yield
    finally:
        for head, gathers in zip(heads, before, strict=True):
            head.gathers = gathers


def gathered_output(module: nn.Module, output: Tensor) -> Tensor | None:
    """The whole output of a module of which `output` is this rank's share; None when it is whole already.

    Collective over the tensor-parallel axis.
    """
    if isinstance(module, ColumnParallel) and not module.gathers:
        return gather_from(output, module.shares, -1)
    return gathered_positions(module, output)


# -- parameters -----------------------------------------------------------------------------------------------------


def _cut_parameters(model: nn.Module, partition: Partition, axis: Axis) -> None:
    """Every cut parameter gets its local shape, and its values if it has any; those that were one stay one."""
    done: dict[nn.Parameter, nn.Parameter] = {}
    for name, whole in list(model.named_parameters(remove_duplicate=False)):
        rule = partition.placements[name].rule
        if rule is None:
            continue
        path, _, leaf = name.rpartition(".")
        if whole not in done:
            done[whole] = _cut(name, whole, rule, axis)
        module = model.get_submodule(path)
        module._parameters[leaf] = done[whole]
        note(module, axis, rules={leaf: rule}, partial={leaf: rule.copies} if rule.copies > 1 else {})


def _cut(name: str, whole: nn.Parameter, rule: Rule, axis: Axis) -> nn.Parameter:
    shares = Shares.by_rule(rule, axis)
    if not all(shares.size(rank) for rank in range(axis.size)):
        raise ModelError(
            f"{name}: its dimension of {shares.whole} leaves nothing to some of the "
            f"parallel.tensor_parallel_size={axis.size} ranks; set a smaller size"
        )
    part = shares.take(whole.detach(), rule.dim).clone(memory_format=torch.contiguous_format)
    parameter = nn.Parameter(part, requires_grad=whole.requires_grad)
    set_whole(parameter, rule, axis)
    return parameter


def note(module: nn.Module, axis: Axis, *, rules: Mapping[str, Rule], partial: Mapping[str, int]) -> Shard:
    """Add to what stands on a module about its parameters."""
    known = shard_of(module) or Shard(axis, {}, {})
    facts = Shard(axis, {**known.rules, **rules}, {**known.partial, **partial})
    module.collie_shard = facts  # type: ignore[assignment]
    return facts


def _hook(parameter: nn.Parameter, axis: Axis, neighbours: int) -> None:
    """Sum the gradient over groups of so many neighbouring ranks, before it is accumulated."""
    if parameter.requires_grad and not hasattr(parameter, "collie_hooked"):
        parameter.register_hook(lambda gradient: _sum_over_neighbours(gradient, axis, neighbours))
        parameter.collie_hooked = True  # type: ignore[attr-defined]


def _sum_over_neighbours(gradient: Tensor, axis: Axis, neighbours: int) -> Tensor:
    if neighbours == axis.size:
        return total(gradient, axis)
    first = axis.rank // neighbours * neighbours
    # All ranks of the axis gather, since a group of the neighbours alone does not exist: such gradients are small.
    return torch.stack(gathered(gradient, axis)[first : first + neighbours]).sum(0)


# -- modules --------------------------------------------------------------------------------------------------------


def _apply_style(name: str, module: nn.Module, style: str, axis: Axis, *, is_head: bool) -> None:
    kind, _, _ = style.partition(":")  # the number of packed blocks stands in the rule
    if kind in COLUMN:
        _make_column(name, module, gathers=is_head or kind in BETWEEN_WHOLE, role=Head if is_head else ColumnParallel)
    elif kind in ROW:
        _make_row(name, module, splits=kind in BETWEEN_WHOLE)
    elif kind == EMBEDDING:
        _make_embedding(name, module)
    elif kind == "moe_tp_experts":
        _make_experts(name, module)
    elif kind == "replicated_with_grad_allreduce":
        note(module, axis, rules={}, partial=dict.fromkeys(dict(module.named_parameters(recurse=False)), axis.size))
    elif kind not in PASSIVE:
        raise ModelError(
            f"{name} has the tensor-parallel style {style!r}, which is not supported; "
            "set parallel.tensor_parallel_size=1, or declare another style in its model family"
        )


def _make_column(name: str, module: nn.Module, *, gathers: bool, role: type[ColumnParallel]) -> None:
    facts = _facts(name, module)
    if not isinstance(module, nn.Linear | Conv1D):
        raise _refusal(name, module, "is split by its outputs")
    shares = Shares.by_rule(facts.rules["weight"], facts.axis)
    setattr(module, "out_features" if isinstance(module, nn.Linear) else "nf", shares.size())
    assert not (gathers and facts.partial), (
        f"{name}: gathered outputs of copies would count twice in its input's gradient"
    )
    become(module, role)
    module.shares, module.gathers, module.block = shares, gathers, None  # type: ignore[assignment]


def _make_row(name: str, module: nn.Module, *, splits: bool) -> None:
    facts = _facts(name, module)
    if type(module).forward not in (nn.Linear.forward, Conv1D.forward):
        raise _refusal(name, module, "is split by its inputs")
    shares = Shares.by_rule(facts.rules["weight"], facts.axis)
    setattr(module, "in_features" if isinstance(module, nn.Linear) else "nx", shares.size())
    become(module, RowParallel)
    module.shares, module.splits, module.block = shares, splits, None  # type: ignore[assignment]
    module.transposed = isinstance(module, Conv1D)  # type: ignore[assignment]


def _make_embedding(name: str, module: nn.Module) -> None:
    facts = _facts(name, module)
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        raise _refusal(name, module, "is split by its rows")
    shares = Shares.by_rule(facts.rules["weight"], facts.axis)
    ((begin, end),) = shares.mine
    module.num_embeddings = end - begin
    if module.padding_idx is not None:  # its row gets no gradient, on the rank that has it
        module.padding_idx = module.padding_idx - begin if begin <= module.padding_idx < end else None
    become(module, VocabularyParallel)
    module.shares = shares  # type: ignore[assignment]


def _make_experts(name: str, module: nn.Module) -> None:
    facts = _facts(name, module)
    for parameter, value in module.named_parameters():
        if not hasattr(value, "tensor_model_parallel"):
            raise ModelError(
                f"{name}.{parameter} acts on sums over experts' inner dimension, which no tensor-parallel rank has "
                "whole; set parallel.tensor_parallel_size=1"
            )
    inner = next(rule for rule in facts.rules.values() if len(rule.blocks) == 1)
    for attribute in INNER_SIZES:
        if vars(module).get(attribute) == inner.blocks[0]:
            setattr(module, attribute, inner.length(facts.axis.size, facts.axis.rank))
    become(module, ExpertsParallel)


def _facts(name: str, module: nn.Module) -> Shard:
    facts = shard_of(module)
    assert facts is not None, f"{name} has a style, and its parameters are not cut"
    return facts


def _refusal(name: str, module: nn.Module, what: str) -> ModelError:
    return ModelError(
        f"{name} {what} in the plan, which is not supported for a {type(module).__name__}; "
        "set parallel.tensor_parallel_size=1, or declare another style in its model family"
    )


def _divide_attributes(modules: Mapping[str, nn.Module], divided: Mapping[str, Sequence[str]], axis: Axis) -> None:
    for name, module in modules.items():
        for attribute in divided.get(pattern(name), ()):
            value = getattr(module, attribute)
            if value % axis.size:
                raise ModelError(
                    f"{name}.{attribute}={value} cannot be divided by parallel.tensor_parallel_size={axis.size}; "
                    "set a size that divides it"
                )
            setattr(module, attribute, value // axis.size)


def _divide_groups(modules: Mapping[str, nn.Module]) -> None:
    """A rank that holds a copy of a key-value head has the fewer query heads for it."""
    for module in modules.values():
        copies = [
            rule.copies for child in module.children() if (facts := shard_of(child)) for rule in facts.rules.values()
        ]
        if "num_key_value_groups" in vars(module):
            module.num_key_value_groups //= max(copies, default=1)  # type: ignore[assignment, operator]
