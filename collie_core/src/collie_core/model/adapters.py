"""An adapter on what this rank holds of a model: made as on the whole one, and cut as the layers that it sits on.

A copy of the model without memory gets the adapter first. From it come the names, shapes and first values of all of the
adapter's parameters, which so are the same on every topology; this rank keeps its slices of them. An adapter that does
not say how its parameters lie along a layer is computed whole on every tensor-parallel rank, between a gathered input
and a split output of the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from collie_core.errors import ModelError
from collie_core.hookspecs import ShardedAdapter
from collie_core.model.blocks import settle_blocks
from collie_core.model.collectives import Shares, gather_from, split_to
from collie_core.model.layers import ColumnParallel, RowParallel, become, shard_of
from collie_core.model.layout import shorten
from collie_core.model.part import Part, part_of
from collie_core.model.partition import Placement, Rule
from collie_core.model.shard import note
from collie_core.model.stages import Stub
from collie_core.model.weights import Gathered, is_finite, stream

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from collie_core.hookspecs import Adapter
    from collie_core.topology import Axis, Topology

UNUSED = "collie_unused"
"""The parameter of a stage on which there is nothing to train."""

PutOn = Callable[[nn.Module], nn.Module]
"""Inserts an adapter into a model, in place, freezes the rest, and gives the model to train."""


@dataclass(frozen=True)
class AdapterPart:
    """The parameters of the adapter on a model; stands on it as `collie_adapter`."""

    placements: Mapping[str, Placement]  # of the whole adapter, in the whole model's order
    topology: Topology
    whole: nn.Module | None = None  # the whole model with the adapter, without values; None: the model is whole

    def __deepcopy__(self, memo: dict[int, Any]) -> AdapterPart:
        return self


def adapter_of(model: nn.Module) -> AdapterPart | None:
    """What a model knows of the adapter on it; None when it has none."""
    found = getattr(model, "collie_adapter", None)
    return found if isinstance(found, AdapterPart) else None


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: value for name, value in model.named_parameters() if value.requires_grad and UNUSED not in name}


def attach(model: nn.Module, adapter: Adapter, put_on: PutOn, topology: Topology, *, seed: int) -> nn.Module:
    """`put_on(model)` for a whole model or this rank's part of one; the adapter's first values depend on `seed` alone.

    Collective.

    Raises:
        ModelError: the adapter cannot be put on, or not on a part.
    """
    part = part_of(model)
    torch.manual_seed(seed)
    if part is None or topology.model.size == 1:
        model = put_on(model)
        placements = {name: Placement(name, tuple(value.shape), 0) for name, value in trainable(model).items()}
        whole = None
    else:
        hollow = _hollow(part, model)
        before = {id(module): name for name, module in hollow.named_modules() if name}
        whole = put_on(hollow)
        torch.manual_seed(seed)
        if _holds_one(model, _holders(whole, before)):
            model = _put_on_part(model, adapter, put_on, topology.tp)
        else:
            model.requires_grad_(False)
        if not trainable(model):  # engines need something to work on; it is never used
            model.register_parameter(UNUSED, nn.Parameter(torch.zeros(1)))
        placements = _keep_own_slices(model, whole, adapter, topology)
    if part is not None:
        _require_tied(part, placements)
    model.collie_adapter = AdapterPart(placements, topology, whole)  # type: ignore[assignment]
    settle_blocks(model)
    return model


def narrow_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep the frozen float32 weights of linear layers in the precision `dtype` that they compute in.

    Autocast would cast them to it in every forward, so nothing that is computed changes. Weights that another module
    shares, such as a tied embedding, stay.
    """
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    others = {id(value) for module in model.modules() if not isinstance(module, nn.Linear) for value in _own(module)}
    for value in (value for module in linear for value in _own(module)):
        if not value.requires_grad and value.dtype == torch.float32 and id(value) not in others:
            value.data = value.data.to(dtype)


def _own(module: nn.Module) -> Iterator[nn.Parameter]:
    return module.parameters(recurse=False)


def _require_tied(part: Part, placements: Mapping[str, Placement]) -> None:
    """Refuse a trained copy of a matrix that is embedding and head at once: only one of them would be the copy.

    Raises:
        ModelError: there is one.
    """
    ends = (f"{part.partition.embedding}.", f"{part.partition.head}.")
    for name, placement in placements.items():
        end = next((end for end in ends if name.startswith(end)), "")
        whole = part.partition.placements.get(f"{end}weight")
        if part.partition.tied and whole is not None and placement.shape == whole.shape:
            raise ModelError(
                f"modules_to_save trains a copy of {end.rstrip('.')}, and in this model embedding and head are one "
                "matrix (tie_word_embeddings), which the copy would part; leave it out, or train the whole model"
            )


# -- values ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def fill(model: nn.Module, values: Mapping[str, Tensor], source: str) -> None:
    """Give the adapter on this rank's part of a model its slices of saved `values`, whole tensors by parameter name.

    Raises:
        ModelError: one is missing, misshapen or not finite, or there is one without a place; names it and `source`.
    """
    adapter = adapter_of(model)
    assert adapter is not None
    if missing := sorted(set(adapter.placements) - set(values)):
        raise ModelError(f"the adapter in {source} does not fit the model: it lacks {shorten(missing)}")
    if unexpected := sorted(set(values) - set(adapter.placements)):
        raise ModelError(f"the adapter in {source} does not fit the model: no place for {shorten(unexpected)}")
    for name, placement in adapter.placements.items():
        found = tuple(values[name].shape)
        if found != placement.shape:
            raise ModelError(
                f"the adapter in {source} does not fit the model: {name} has the shape {list(found)} and should have "
                f"{list(placement.shape)}"
            )
        if not is_finite(values[name]):
            raise ModelError(f"the adapter in {source} is damaged: not finite: {name}")
    for name, parameter in trainable(model).items():
        parameter.copy_(_slice(values[name], adapter.placements[name].rule, adapter.topology.tp))


def whole_state(model: nn.Module, gathered: Gathered) -> dict[str, Tensor]:
    """Every parameter of the adapter by name, whole, in the main rank's host memory; nothing elsewhere. Collective."""
    adapter = adapter_of(model)
    assert adapter is not None
    return {
        name: value.detach().to("cpu", copy=True).contiguous()
        for name, value in stream(trainable(model), adapter.placements, adapter.topology, gathered)
        if value is not None
    }


def whole_of_part(model: nn.Module) -> nn.Module:
    """The whole model with the adapter, possibly without values."""
    adapter = adapter_of(model)
    return model if adapter is None or adapter.whole is None else adapter.whole


# -- a part of the model --------------------------------------------------------------------------------------------


def _hollow(part: Part, model: Any) -> PreTrainedModel:
    """The whole model with frozen weights that take no memory and are no numbers, nor is what is made from them."""
    from collie_core.model.build import empty_model

    whole = empty_model(part.family, model.config)
    nothing = torch.full((), torch.nan, dtype=model.config.dtype)
    for module in whole.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(nothing.expand(parameter.shape), requires_grad=False)
    return whole


def _holders(whole: nn.Module, before: Mapping[int, str]) -> set[str]:
    """The modules of the model to which an adapter has added parameters; `before` are all modules by `id`."""
    modules, found = dict(whole.named_modules()), set()
    for name in trainable(whole):
        path = name.rpartition(".")[0]
        while path and not (known := _known(modules[path], before)):
            path = path.rpartition(".")[0]
        found.add(known if path else "")
    return found


def _known(module: nn.Module, before: Mapping[int, str]) -> str:
    """The name that a module, or the one that it was put around, had before."""
    inner = (getattr(module, name, None) for name in ("base_layer", "original_module"))
    return next((before[id(one)] for one in (module, *inner) if id(one) in before), "")


def _holds_one(model: nn.Module, names: set[str]) -> bool:
    """Whether this rank has one of these modules."""
    return any(name in names and not isinstance(module, Stub) for name, module in model.named_modules())


def _put_on_part(model: nn.Module, adapter: Adapter, put_on: PutOn, axis: Axis) -> nn.Module:
    with _without_stubs(model):
        if axis.size == 1 or isinstance(adapter, ShardedAdapter):
            return put_on(model)
        with _whole_sizes(model):
            model = put_on(model)
    for name, module in model.named_modules():
        if isinstance(base := getattr(module, "base_layer", None), nn.Module):
            _compute_whole(name, module, base)
    return model


@contextmanager
def _without_stubs(model: nn.Module) -> Iterator[None]:
    """Inside, modules of other stages are missing, so that nothing is put on what stands for them."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()  # peft looks at it in any case
    stubs = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if isinstance(child, Stub) and child is not embedding
    ]
    kept = [parent._modules[name] for parent, name in stubs]
    for parent, name in stubs:
        parent._modules[name] = None
    try:
        yield
    finally:
        for (parent, name), stub in zip(stubs, kept, strict=True):
            parent._modules[name] = stub


@contextmanager
def _whole_sizes(model: nn.Module) -> Iterator[None]:
    """Inside, linear layers say how many inputs and outputs the whole layer has."""
    changed = []
    for module in model.modules():
        if isinstance(module, ColumnParallel | RowParallel):
            names = ("out_features", "nf") if isinstance(module, ColumnParallel) else ("in_features", "nx")
            name = next(name for name in names if hasattr(module, name))
            changed.append((module, name, getattr(module, name)))
            setattr(module, name, module.shares.whole)
    yield
    for module, name, size in changed:
        setattr(module, name, size)


def _compute_whole(name: str, module: nn.Module, base: nn.Module) -> None:
    """Let a module that an adapter has put around a sharded layer work on all inputs and give all outputs."""
    facts = shard_of(base)
    if facts is None:
        return
    if not isinstance(base, ColumnParallel | RowParallel) or any(rule.copies > 1 for rule in facts.rules.values()):
        raise ModelError(
            f"the adapter cannot be put on {name} with parallel.tensor_parallel_size={facts.axis.size}: ranks hold "
            "copies or shares of it that it does not know how to use; leave it out, or set a smaller size"
        )
    shares = base.shares
    if isinstance(base, ColumnParallel) and not base.gathers:
        base.gathers = True
        module.register_forward_hook(lambda module, inputs, output: split_to(output, shares, -1))
    elif isinstance(base, RowParallel) and not base.splits:
        base.splits = True
        module.register_forward_pre_hook(lambda module, inputs: (gather_from(inputs[0], shares, -1), *inputs[1:]))


# -- slices ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _keep_own_slices(model: nn.Module, whole: nn.Module, adapter: Adapter, topology: Topology) -> dict[str, Placement]:
    """Cut the adapter on this rank's part as the layers below it are cut, with the values of the whole one."""
    values, modules = trainable(whole), dict(model.named_modules())
    own: dict[str, Rule | None] = {}
    for name, parameter in trainable(model).items():
        own[name] = _cut(name, values[name], modules, adapter) if topology.tp.size > 1 else None
        mine = _slice(values[name], own[name], topology.tp)
        assert mine.shape == parameter.shape, f"{name}: {list(parameter.shape)} is not the share {list(mine.shape)}"
        if not mine.isnan().any():  # else it is a copy of weights, which this rank has made of its own
            parameter.copy_(mine)
    places: dict[str, tuple[int, Rule | None]] = {}
    for stage, found in topology.gather_objects((topology.pp.rank, own)):
        for name, rule in found.items():
            places.setdefault(name, (stage, rule))
    placements = {  # all of them, except in a plan, which knows of its own stage alone
        name: Placement(name, tuple(value.shape), *places[name]) for name, value in values.items() if name in places
    }
    for value in values.values():  # the whole is kept for its names
        value.data = value.new_full((), torch.nan).expand(value.shape)
    return placements


def _cut(name: str, value: Tensor, modules: Mapping[str, nn.Module], adapter: Adapter) -> Rule | None:
    """The rule of an adapter's parameter, whose module learns to compute with its share; None: every rank has it whole.

    Raises:
        ModelError: it sits on a layer that is cut in another way than by inputs or outputs.
    """
    path, _, leaf = name.rpartition(".")
    owner = modules[path]
    if (facts := shard_of(owner)) is not None and leaf in facts.rules:  # a copy of a layer of the model, or its bias
        return facts.rules[leaf]
    base = _base_of(path, modules)
    if base is None or (facts := shard_of(base)) is None or not isinstance(adapter, ShardedAdapter):
        return None
    if not isinstance(base, ColumnParallel | RowParallel):
        raise ModelError(
            f"{path}: an adapter on a {type(base).__bases__[-1].__name__} that tensor-parallel ranks share is not "
            "supported; leave it out, or set parallel.tensor_parallel_size=1"
        )
    along = adapter.cut(name, tuple(value.shape))
    if along is None or (along[1] == "outputs") != isinstance(base, ColumnParallel):
        return None
    rule = replace(facts.rules["weight"], dim=along[0])
    partial = {leaf: rule.copies} if rule.copies > 1 else {}
    note(owner, facts.axis, rules={leaf: rule}, partial=partial)
    if isinstance(owner, nn.Linear):
        _compute_share(owner, rule, base)
    return rule


def _base_of(path: str, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    """The layer around which the module at `path`, or one above it, was put."""
    while path:
        if isinstance(base := getattr(modules[path], "base_layer", None), nn.Module):
            return base
        path = path.rpartition(".")[0]
    return None


def _compute_share(linear: nn.Module, rule: Rule, base: Any) -> None:
    """Make a small matrix beside a sharded layer sharded in the same way: its outputs, or its inputs."""
    shares: Shares = base.shares
    if isinstance(base, ColumnParallel):
        assert rule.dim == 0
        linear.out_features = shares.size()  # type: ignore[assignment]
        become(linear, ColumnParallel)
        linear.shares, linear.gathers, linear.block = shares, base.gathers, None  # type: ignore[assignment]
    else:
        assert rule.dim == 1
        linear.in_features = shares.size()  # type: ignore[assignment]
        become(linear, RowParallel)
        linear.shares, linear.splits, linear.block = shares, base.splits, None  # type: ignore[assignment]
        linear.transposed = False  # type: ignore[assignment]


def _slice(value: Tensor, rule: Rule | None, axis: Axis) -> Tensor:
    """This rank's part of a whole tensor."""
    return value if rule is None else Shares.by_rule(rule, axis).take(value, rule.dim)
