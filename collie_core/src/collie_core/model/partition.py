"""The plan of a partition: which rank holds which slice of which parameter. No weights, no groups, no GPU.

A plan is made from the model on the meta device and the declarations of its family; everything that touches
parameters (building, loading, saving, adapters, checkpoints) follows it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Literal, cast

from collie_core.config.split import tensor_size_problem
from collie_core.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

    from collie_core.hookspecs import ModelFamily

Interval = tuple[int, int]
"""[begin, end) along one dimension."""

Cuts = Literal["parameters", "uniform"] | Sequence[int]
"""How layers are dealt out to stages: by their parameters, by their number, or so many to each."""


@dataclass(frozen=True)
class Rule:
    """How one dimension of a tensor is cut over the tensor-parallel ranks.

    The dimension consists of `blocks` laid end to end (several for a fused tensor such as gate and up), and every
    rank takes its part of each. Cuts fall on multiples of `unit` (the size of a head). With `copies` > 1 that many
    neighbouring ranks hold the same part, since there are fewer units than ranks.
    """

    dim: int
    blocks: tuple[int, ...]
    unit: int = 1
    copies: int = 1

    def intervals(self, size: int, rank: int) -> list[Interval]:
        """What rank `rank` of `size` holds of the whole dimension; as `torch.chunk` cuts, so possibly uneven."""
        parts, part = size // self.copies, rank // self.copies
        found, start = [], 0
        for block in self.blocks:
            chunk = math.ceil(block // self.unit / parts) * self.unit
            begin, end = min(part * chunk, block), min((part + 1) * chunk, block)
            if begin < end:
                found.append((start + begin, start + end))
            start += block
        return found

    def length(self, size: int, rank: int) -> int:
        """How many entries rank `rank` of `size` holds."""
        return sum(end - begin for begin, end in self.intervals(size, rank))


@dataclass(frozen=True)
class Placement:
    """Where one parameter of the whole model lives."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor
    stage: int  # the pipeline stage that owns it
    rule: Rule | None = None  # how tensor-parallel ranks share it; None: each holds the whole
    tied_to: str = ""  # the parameter it shares its values with; it is neither read nor written then

    def local_shape(self, size: int, rank: int) -> tuple[int, ...]:
        """The shape on tensor-parallel rank `rank` of `size`."""
        if self.rule is None:
            return self.shape
        shape = list(self.shape)
        shape[self.rule.dim] = self.rule.length(size, rank)
        return tuple(shape)


@dataclass(frozen=True)
class Partition:
    """The plan of a whole model for one topology."""

    tensor_size: int
    cuts: tuple[int, ...]  # the first layer of each pipeline stage, then the number of layers
    placements: Mapping[str, Placement]  # by parameter, in the model's order, tied ones included
    styles: Mapping[str, str]  # module -> tensor-parallel style
    children: tuple[str, ...]  # of the base model, in the order of the forward pass
    layers: str  # which of them is the list of layers
    embedding: str  # the module of the input embedding
    head: str  # the module of the output head
    base: str  # the module of the base model

    @property
    def pipeline_size(self) -> int:
        """The number of stages."""
        return len(self.cuts) - 1

    @property
    def tied(self) -> bool:
        """Whether the head shares the weight of the embedding."""
        head = self.placements.get(f"{self.head}.weight")
        return head is not None and bool(head.tied_to)

    def owned_layers(self, stage: int) -> range:
        """The layers of a stage."""
        return range(self.cuts[stage], self.cuts[stage + 1])


def pattern(name: str) -> str:
    """A name with `*` for each number in it."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def plan(
    model: PreTrainedModel,
    family: ModelFamily,
    *,
    tensor_size: int = 1,
    pipeline_size: int = 1,
    cuts: Cuts = "parameters",
) -> Partition:
    """The partition of a model (on the meta device, whole).

    Raises:
        ModelError: it cannot be cut so; with the sizes that would work, or the declaration that is missing.
    """
    names = _Names.of(model, family)
    if pipeline_size > 1:
        names.check_pipeline(model)
    config = model.config.get_text_config()
    bounds = _bounds(model, names, pipeline_size, cuts)
    styles = _styles(model, family, names) if tensor_size > 1 else {}
    if styles:
        _check_heads(config, tensor_size)
    rules = _Rules(model, family, names, tensor_size).of(styles)
    owners: dict[int, str] = {}
    placements = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = owners.setdefault(id(parameter), name)
        placements[name] = Placement(
            name,
            tuple(parameter.shape),
            names.stage(name, bounds),
            rules.get(name, rules.get(owner)),
            tied_to="" if owner == name else owner,
        )
    return Partition(
        tensor_size, bounds, placements, styles, names.children, names.layers, names.embedding, names.head, names.base
    )


# -- the parts of a model by name --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Names:
    """What a stock causal language model calls its parts."""

    family: str
    base: str
    children: tuple[str, ...]  # of the base, in the order of the forward pass
    layers: str  # "" when there is no list of layers
    embedding: str
    head: str

    @classmethod
    def of(cls, model: PreTrainedModel, family: ModelFamily) -> _Names:
        from torch import nn

        modules = {id(module): name for name, module in reversed(list(model.named_modules()))}
        base = model.base_model
        children = tuple(getattr(family, "pipeline_plan", ())) or _derived_children(cast("PreTrainedModel", base))
        lists = [name for name in children if isinstance(getattr(base, name, None), nn.ModuleList)]
        return cls(
            family.model_type,
            modules[id(base)],
            children,
            lists[0] if len(lists) == 1 else "",
            modules.get(id(model.get_input_embeddings()), ""),
            modules.get(id(model.get_output_embeddings()), ""),
        )

    def check_pipeline(self, model: PreTrainedModel) -> None:
        """Refuse what no plan covers: every parameter must belong to a child, a layer or the head."""
        if not (self.layers and self.head and self.embedding):
            raise ModelError(
                f"the {self.family} family cannot be cut into pipeline stages: it needs one list of layers, an input "
                "embedding and an output head; declare `pipeline_plan` in its family"
            )
        for name, _ in model.named_parameters():
            if self._child(name) is None and not name.startswith(f"{self.head}."):
                raise ModelError(
                    f"the {self.family} family cannot be cut into pipeline stages: {name} belongs to no part of its "
                    f"plan ({', '.join(self.children)}); declare `pipeline_plan` in its family"
                )

    def stage(self, parameter: str, bounds: Sequence[int]) -> int:
        """The stage that owns a parameter."""
        last = len(bounds) - 2
        child = self._child(parameter)
        if last == 0 or child is None:
            return last
        if child == self.layers:
            number = self.layer(parameter)
            return next(stage for stage in range(last + 1) if number < bounds[stage + 1])
        return 0 if self.children.index(child) < self.children.index(self.layers) else last

    def layer(self, parameter: str) -> int:
        """The number of the layer that a parameter of a layer belongs to."""
        return int(self._inside(parameter).split(".")[1])

    def _inside(self, name: str) -> str:
        return name.removeprefix(f"{self.base}.") if self.base else name

    def _child(self, parameter: str) -> str | None:
        if self.base and not parameter.startswith(f"{self.base}."):
            return None
        inside = self._inside(parameter)
        return next((child for child in self.children if inside.startswith(f"{child}.")), None)


def _derived_children(base: PreTrainedModel) -> tuple[str, ...]:
    """The order that transformers declares, or that of the children that do something, as they are defined."""
    from torch import nn

    declared = getattr(base.config, "base_model_pp_plan", None)
    if declared:
        return tuple(declared)
    return tuple(
        name
        for name, child in base.named_children()
        if isinstance(child, nn.Dropout) or next(child.parameters(), None) is not None
    )


# -- pipeline stages ----------------------------------------------------------------------------------------------


def _bounds(model: PreTrainedModel, names: _Names, size: int, cuts: Cuts) -> tuple[int, ...]:
    """The first layer of each stage, then the number of layers."""
    if not names.layers:
        return (0, 0)
    count = len(getattr(model.base_model, names.layers))
    if size > count:
        raise ModelError(
            f"parallel.pipeline_parallel_size={size} exceeds the {count} layers of the model; use at most {count}"
        )
    if isinstance(cuts, str):
        lengths = _uniform(count, size) if cuts == "uniform" else _balanced(*_weights(model, names, count), size)
    else:
        lengths = list(cuts)
    if len(lengths) != size or sum(lengths) != count or min(lengths) < 1:
        raise ModelError(
            f"parallel.pipeline_cuts={lengths} must give each of the {size} stages at least one of the {count} layers"
        )
    return tuple(accumulate(lengths, initial=0))


def _uniform(count: int, size: int) -> list[int]:
    """The last stages take what is left over: they have no embedding to hold."""
    each, rest = divmod(count, size)
    return [each + (stage >= size - rest) for stage in range(size)]


def _weights(model: PreTrainedModel, names: _Names, count: int) -> tuple[list[int], int, int]:
    """Parameters of each layer, of what stands before them and of what stands after; a tied head counts again."""
    layers, before, after = [0] * count, 0, 0
    for name, parameter in model.named_parameters(remove_duplicate=False):
        stage = names.stage(name, range(count + 1))  # as if each layer were a stage
        if names._child(name) == names.layers:
            layers[stage] += parameter.numel()
        elif stage == 0 and count > 1:
            before += parameter.numel()
        else:
            after += parameter.numel()
    return layers, before, after


def _balanced(layers: list[int], before: int, after: int, size: int) -> list[int]:
    """Layers per stage such that the largest stage is as small as it can be (dynamic programming)."""
    count = len(layers)
    sums = list(accumulate(layers, initial=0))

    def load(begin: int, end: int) -> int:
        return sums[end] - sums[begin] + before * (begin == 0) + after * (end == count)

    # best[end] = (largest load, first layers of the stages) of the stages so far, which end at layer `end`
    best: dict[int, tuple[int, list[int]]] = {end: (load(0, end), [0]) for end in range(1, count + 1)}
    for stage in range(1, size):
        best = {
            end: min(
                (max(best[begin][0], load(begin, end)), [*best[begin][1], begin])
                for begin in range(stage, end)
                if begin in best
            )
            for end in range(stage + 1, count + 1)
        }
    starts = [*best[count][1], count]
    return [end - begin for begin, end in pairwise(starts)]


# -- tensor parallelism -------------------------------------------------------------------------------------------

COLUMN = ("colwise", "colwise_rep", "colwise_gather_output", "packed_colwise")
ROW = ("rowwise", "rowwise_rep", "rowwise_split_input", "packed_rowwise")
WHOLE = ("replicated_with_grad_allreduce", "replicate", "local_params", "moe_tp_experts")
EMBEDDING = "embedding_rowwise"


def _styles(model: PreTrainedModel, family: ModelFamily, names: _Names) -> dict[str, str]:
    """The style of each module and bare parameter: what transformers declares, the family's word over it."""
    declared = dict(model._tp_plan or {})
    declared.update(getattr(family, "tensor_plan", {}))
    if not any(style.startswith(("colwise", "packed_colwise")) for name, style in declared.items() if "*" in name):
        raise ModelError(
            f"neither transformers nor the family declares how {family.model_type} is shared by tensor-parallel ranks; "
            "set parallel.tensor_parallel_size=1, or declare `tensor_plan` in its family"
        )
    declared |= {names.embedding: EMBEDDING, names.head: "colwise"}
    everything = [name for name, _ in model.named_modules()] + [name for name, _ in model.named_parameters()]
    styles = {name: style for name in everything if (style := declared.get(pattern(name)))}
    for name, style in styles.items():
        if style.partition(":")[0] not in (*COLUMN, *ROW, *WHOLE, EMBEDDING):
            raise ModelError(
                f"the tensor-parallel style {style!r} of {name} is not supported; declare another in `tensor_plan` of "
                f"the {family.model_type} family, or set parallel.tensor_parallel_size=1"
            )
    return styles


def _heads(config: PretrainedConfig) -> tuple[int, int, int]:
    """Attention heads, key-value heads and the size of one."""
    heads: int = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def _check_heads(config: PretrainedConfig, size: int) -> None:
    heads, kv_heads, _ = _heads(config)
    if problem := tensor_size_problem(heads, kv_heads, size):
        raise ModelError(f"parallel.tensor_parallel_size={size} {problem}")


class _Rules:
    """From styles to the rule of each parameter."""

    def __init__(self, model: PreTrainedModel, family: ModelFamily, names: _Names, size: int) -> None:
        self.modules = dict(model.named_modules())
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.kv_modules = tuple(getattr(family, "kv_modules", ()))
        self.divided = getattr(family, "divided", {})
        self.names = names
        self.size = size
        self.config = model.config.get_text_config()

    def of(self, styles: Mapping[str, str]) -> dict[str, Rule]:
        """The rule of each parameter that is cut."""
        found: dict[str, Rule] = {}
        for name, full_style in styles.items():
            style, _, packed = full_style.partition(":")
            parts = int(packed or 2) if style.startswith("packed") else 1
            if style in WHOLE:
                continue
            if name in self.parameters:
                found[name] = self._bare(self.parameters[name], style, parts)
            elif style == EMBEDDING:
                found[f"{name}.weight"] = Rule(0, (self.parameters[f"{name}.weight"].shape[0],))
            elif style in COLUMN:
                found |= self._column(name, style, parts)
            else:
                found |= self._row(name, parts)
        return found

    def _column(self, name: str, style: str, parts: int) -> dict[str, Rule]:
        dim = 1 if self._transposed(name) else 0
        length = self.parameters[f"{name}.weight"].shape[dim]
        unit, copies = self._unit(name, style, length)
        if parts > 1 and pattern(name.rpartition(".")[0]) in self.divided:
            self._check_block(name, length // parts)
        rules = {f"{name}.weight": Rule(dim, _blocks(length, parts), unit, copies)}
        if f"{name}.bias" in self.parameters:
            rules[f"{name}.bias"] = Rule(0, _blocks(length, parts), unit, copies)
        return rules

    def _check_block(self, name: str, block: int) -> None:
        """Refuse to cut a block of heads that ranks cannot share evenly: the stock code counts them by one number."""
        heads = block // _heads(self.config)[2]
        if heads % self.size:
            allowed = ", ".join(str(size) for size in range(1, heads + 1) if heads % size == 0)
            raise ModelError(
                f"parallel.tensor_parallel_size={self.size} cannot share {name}, whose heads lie in blocks of {heads}; "
                f"sizes that can: {allowed}"
            )

    def _row(self, name: str, parts: int) -> dict[str, Rule]:
        dim = 0 if self._transposed(name) else 1
        length = self.parameters[f"{name}.weight"].shape[dim]
        heads, _, head_dim = _heads(self.config)
        unit = head_dim if length == heads * head_dim else 1
        return {f"{name}.weight": Rule(dim, _blocks(length, parts), unit)}

    def _unit(self, name: str, style: str, length: int) -> tuple[int, int]:
        heads, kv_heads, head_dim = _heads(self.config)
        is_kv = name.rpartition(".")[2] in self.kv_modules and style == "colwise"
        if is_kv and length == kv_heads * head_dim:
            return head_dim, 1 if kv_heads % self.size == 0 else self.size // kv_heads
        return (head_dim, 1) if length == heads * head_dim and name != self.names.head else (1, 1)

    def _bare(self, parameter: Tensor, style: str, parts: int) -> Rule:
        """Of a parameter that the plan names itself: stacked experts [E, out, in], or one value per head."""
        if parameter.ndim == 1:
            return Rule(0, _blocks(parameter.shape[0], parts))
        dim = parameter.ndim - (2 if style in COLUMN else 1)
        return Rule(dim, _blocks(parameter.shape[dim], parts))

    def _transposed(self, name: str) -> bool:
        from transformers.pytorch_utils import Conv1D

        return isinstance(self.modules[name], Conv1D)


def _blocks(length: int, parts: int) -> tuple[int, ...]:
    return (length // parts,) * parts
