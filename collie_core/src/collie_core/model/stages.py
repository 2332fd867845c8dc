"""One pipeline stage: the stock model in which the modules that other stages own are stubs.

The stock `forward` runs on every stage, so masks, rope, scales and layer types are computed by stock code, and
parameters keep their names. Called as usual (evaluation, generation), the stages of a copy work as a chain and every
rank gets the whole logits; inside `own_part` a stage computes its own part alone, for the training schedule.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from collie_core.errors import RunError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from collie_core.hookspecs import ModelFamily
    from collie_core.model.partition import Partition
    from collie_core.topology import Axis, Topology


class Stub(nn.Module):
    """Stands for a module of another stage: gives its first argument back."""

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """The hidden states as they came."""
        return inputs[0] if inputs else next(iter(options.values()))


class TupleStub(Stub):
    """For blocks that return a tuple."""

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """The hidden states as they came, as a 1-tuple."""
        return (super().forward(*inputs, **options),)


class ZeroStub(Stub):
    """For what is added to the hidden states, such as position embeddings."""

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """A zero that may be added to anything."""
        return torch.zeros(())


STUBS: dict[str, type[Stub]] = {"identity": Stub, "tuple": TupleStub, "zero": ZeroStub}


@dataclass
class Stage:
    """What a cut model knows of the pipeline; stands on it as `collie_stage`."""

    axis: Axis
    hidden_size: int
    vocab_size: int
    owned: tuple[int, ...]  # numbers of its layers
    head: str  # the module of the output head
    borrows_head: bool  # the head shares the weight of the first stage's embedding
    embedding: str
    alone: bool = False  # computing its own part, see `own_part`
    loans: list[Loan] = field(default_factory=list)
    virtual_tokens: int = 0  # positions before those of the batch that an adapter has added, until a cache holds them

    @property
    def is_first(self) -> bool:
        """Whether it takes token ids."""
        return self.axis.rank == 0

    @property
    def is_last(self) -> bool:
        """Whether it gives logits."""
        return self.axis.rank == self.axis.size - 1


def stage_of(model: nn.Module) -> Stage | None:
    """The stage that a model is, also through wrappers; None for a whole model."""
    return cast("Stage | None", getattr(model, "collie_stage", None))


def is_stage(model: nn.Module) -> bool:
    """Whether a model is one of several pipeline stages, which lacks the modules of the others."""
    return stage_of(model) is not None


def cut(model: PreTrainedModel, partition: Partition, family: ModelFamily, topology: Topology) -> None:
    """Keep what this rank's stage owns, in place; stubs take the place of everything else."""
    axis, base = topology.pp, model.base_model
    layers = getattr(base, partition.layers)
    owned = partition.owned_layers(axis.rank)
    stubs = getattr(family, "stubs", {})
    for name, _ in base.named_children():
        if name == partition.layers:
            for number in range(len(layers)):
                if number not in owned:
                    layers[number] = STUBS[stubs.get(name, "identity")]()
        elif name in partition.children and not _owns(partition, name, axis):
            setattr(base, name, STUBS[stubs.get(name, "identity")]())
    if axis.rank < axis.size - 1:
        model.set_submodule(partition.head, Stub())
    if axis.rank > 0:
        _set_later(model, getattr(family, "later_stages", {}))
    config = model.config.get_text_config()
    model.collie_stage = Stage(  # type: ignore[assignment]
        axis,
        config.hidden_size,
        config.vocab_size,
        tuple(owned),
        partition.head,
        partition.tied,
        partition.embedding,
    )
    stock: Any = type(model)
    model.__class__ = _stage_class(stock)


@contextmanager
def own_part(model: nn.Module) -> Iterator[None]:
    """Inside, a stage takes token ids or the hidden states before it, and gives those after it or logits."""
    stage = stage_of(model)
    if stage is None:
        yield
        return
    before, stage.alone = stage.alone, True
    try:
        yield
    finally:
        stage.alone = before


def wire_dtype(model: nn.Module) -> torch.dtype:
    """The precision of hidden states between stages: that of the weights, of several the widest."""
    dtypes = {value.dtype for value in model.parameters() if value.is_floating_point()}
    return functools.reduce(torch.promote_types, dtypes)


# -- what stages share ----------------------------------------------------------------------------------------------
# A tensor that several stages need is owned by the first: it is a parameter there, or computed from parameters. The
# others borrow its value after every update, and their gradients go back to the first stage before its last backward.
# So parameters have one optimizer state, count once in norms, and copies of them cannot drift apart.


@dataclass
class Loan:
    """A tensor that the first stage has and later stages borrow."""

    own: Callable[[], Tensor]  # on the first stage: the tensor, with its graph
    shape: tuple[int, ...]
    borrowers: tuple[int, ...]  # numbers of the stages
    place: Callable[[Tensor], None] = lambda value: None  # on a borrower: takes what has come
    value: Tensor | None = None  # what has come; a leaf
    wants_gradient: bool | None = None  # whether anything is trained through it; None: not known yet


def borrow_head(model: nn.Module) -> None:
    """The last stage borrows the weight of a tied head: it has no parameter of its own for it."""
    stage = stage_of(model)
    if stage is None or not stage.borrows_head:
        return
    if stage.is_last:
        head = model.get_submodule(stage.head)
        shape = tuple(_weight(model, stage.head).shape)
        del head._parameters["weight"]
        head.register_buffer("weight", torch.zeros(()).expand(shape), persistent=False)
    else:
        shape = tuple(_weight(model, stage.embedding).shape) if stage.is_first else ()
    # Modules are looked up when they are wanted: an adapter may have put others around them.
    stage.loans.append(
        Loan(
            own=lambda: _weight(model, stage.embedding),
            shape=shape,
            borrowers=(stage.axis.size - 1,),
            place=lambda value: _stage_model(model).get_submodule(stage.head)._buffers.update(weight=value),
        )
    )


@torch.no_grad()
def lend(model: nn.Module) -> None:
    """Bring what the first stage owns to its borrowers. Collective over a copy's stages; after every update."""
    stage = stage_of(model)
    for loan in () if stage is None else stage.loans:
        assert stage is not None
        if stage.is_first:
            _send(loan, model, stage)
        elif stage.axis.rank in loan.borrowers:
            _receive(loan, model, stage)


def _send(loan: Loan, model: nn.Module, stage: Stage) -> None:
    with torch.enable_grad():
        value = loan.own()
    first, loan.wants_gradient = loan.wants_gradient is None, value.requires_grad
    value = value.detach().to(wire_dtype(model)).contiguous()
    for borrower in loan.borrowers:
        if first:
            dist.send(value.new_full((1,), float(loan.wants_gradient)), stage.axis.ranks[borrower])
        dist.send(value, stage.axis.ranks[borrower])


def _receive(loan: Loan, model: nn.Module, stage: Stage) -> None:
    value = torch.empty(loan.shape, dtype=wire_dtype(model), device=next(model.parameters()).device)
    if loan.wants_gradient is None:
        wants = value.new_empty(1)
        dist.recv(wants, stage.axis.ranks[0])
        loan.wants_gradient = bool(wants.item())
    dist.recv(value, stage.axis.ranks[0])
    loan.value = value.requires_grad_(loan.wants_gradient)
    loan.place(loan.value)


def return_gradients(model: nn.Module) -> None:
    """On borrowers: send the gradients of what they borrowed to the first stage, and start anew."""
    stage = stage_of(model)
    for loan in () if stage is None else stage.loans:
        assert stage is not None
        if stage.axis.rank in loan.borrowers and loan.wants_gradient:
            assert loan.value is not None
            gradient = torch.zeros_like(loan.value) if loan.value.grad is None else loan.value.grad
            dist.send(gradient.contiguous(), stage.axis.ranks[0])
            loan.value.grad = None


def receive_gradients(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """On the first stage: each tensor that it lends, with its graph, and the sum of its borrowers' gradients."""
    stage = stage_of(model)
    if stage is None or not stage.is_first:
        return []
    found = []
    for loan in filter(lambda loan: loan.wants_gradient, stage.loans):
        tensor = loan.own()
        total = torch.zeros_like(tensor, dtype=wire_dtype(model))
        for borrower in loan.borrowers:
            gradient = torch.empty_like(total)
            dist.recv(gradient, stage.axis.ranks[borrower])
            total += gradient
        found.append((tensor, total.to(tensor.dtype)))
    return found


def _weight(model: nn.Module, module: str) -> Tensor:
    return cast(Tensor, _stage_model(model).get_submodule(module).weight)


def _stage_model(model: nn.Module) -> nn.Module:
    """The stage itself, inside the wrapper of an adapter."""
    return next(module for module in model.modules() if "collie_stage" in vars(module))


# -- the forward of a stage ---------------------------------------------------------------------------------------


@functools.cache
def _stage_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The stock class with the forward of a stage. `generate` reads the signature, so it stays the stock one."""

    @functools.wraps(stock.forward)
    def forward(self: Any, *args: Any, **options: Any) -> Any:
        if args:
            options["input_ids"] = args[0]
        own = functools.partial(_own_forward, stock, self)
        return own(**options) if self.collie_stage.alone else _chained(self, own, **options)

    return type(stock.__name__, (stock,), {"forward": forward})


def _own_forward(stock: type[PreTrainedModel], model: Any, **options: Any) -> Any:
    """An output whose `logits` are the hidden states after this stage, [B, L, H], or on the last stage the logits.

    Stages before the last run the base model alone: what stands after a head is none of their business.
    """
    if model.collie_stage.is_last:
        return stock.forward(model, **options)
    from transformers.modeling_outputs import CausalLMOutputWithPast

    options.pop("logits_to_keep", None)
    output = model.base_model(**options)
    return CausalLMOutputWithPast(logits=output.last_hidden_state, past_key_values=output.past_key_values)


def _chained(model: Any, own: Any, *, input_ids: Tensor | None = None, **options: Any) -> Any:
    """Every stage of this copy in turn; all ranks of the copy call it together and get the whole logits, float32.

    Raises:
        RunError: gradients are wanted, which flow through the training schedule only.
    """
    stage: Stage = model.collie_stage
    if torch.is_grad_enabled():
        raise RunError(
            "a pipeline stage cannot be called with gradients outside the training schedule; set "
            "parallel.pipeline_parallel_size=1 to replace the forward pass by a function of your own"
        )
    shape = (options["inputs_embeds"] if input_ids is None else input_ids).shape[:2]
    device = next(model.parameters()).device
    if stage.is_first:
        options["input_ids"] = input_ids
    else:
        length = shape[1] + (0 if is_filled(options.get("past_key_values")) else stage.virtual_tokens)
        hidden = torch.empty(shape[0], length, stage.hidden_size, dtype=wire_dtype(model), device=device)
        dist.recv(hidden, stage.axis.ranks[stage.axis.rank - 1])
        options["inputs_embeds"] = hidden
    options.pop("labels", None)
    output = own(**options)
    if stage.is_last:
        logits = output.logits.float().contiguous()
    else:
        dist.send(output.logits.to(wire_dtype(model)).contiguous(), stage.axis.ranks[stage.axis.rank + 1])
        kept = options.get("logits_to_keep", 0)
        assert isinstance(kept, int), "positions as a tensor are not used by transformers' generation"
        logits = torch.empty(shape[0], min(kept, shape[1]) or shape[1], stage.vocab_size, device=device)
    dist.broadcast(logits, stage.axis.ranks[-1], group=stage.axis.group)
    output.logits = logits
    return output


def _owns(partition: Partition, child: str, axis: Axis) -> bool:
    """Whether a stage owns a child of the base model: those before the layers are the first stage's."""
    before = partition.children.index(child) < partition.children.index(partition.layers)
    return axis.rank == (0 if before else axis.size - 1)


def _set_later(model: PreTrainedModel, attributes: Any) -> None:
    for owner in [model.config, *model.modules()]:
        for name, value in attributes.items():
            if name in vars(owner):
                setattr(owner, name, value)


# -- generation ---------------------------------------------------------------------------------------------------


def is_filled(cache: Any) -> bool:
    """Whether a key-value cache, or None, holds positions already."""
    return cache is not None and cache.get_seq_length() > 0


def stage_cache(model: nn.Module, *, windows: bool = True) -> Any:
    """A key-value cache for the layers of this stage; None for a whole model, which makes its own.

    Without `windows` layers whose attention is limited to one keep what has left it too.
    """
    stage = stage_of(model)
    if stage is None:
        return None
    from transformers import DynamicCache

    class StageCache(DynamicCache):
        """Questions about layers of other stages are answered from one of the same kind that this stage owns."""

        def get_seq_length(self, layer_idx: int = 0) -> int:
            return int(super().get_seq_length(self._own(layer_idx)))

        def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
            sizes: tuple[int, int] = super().get_mask_sizes(query_length, self._own(layer_idx))
            return sizes

        def _own(self, number: int) -> int:
            assert stage is not None
            if number in stage.owned or number >= len(self.layers):
                return number if number in stage.owned else stage.owned[0]
            layers: Any = self.layers
            kind = layers[number].is_sliding
            return next((own for own in stage.owned if layers[own].is_sliding == kind), stage.owned[0])

    config: Any = model.config
    return StageCache(config=config.get_text_config()) if windows else StageCache()
