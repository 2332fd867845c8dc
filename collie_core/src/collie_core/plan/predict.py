"""The memory of a rank, predicted: its steps are taken on fake tensors, and the peak is read from their trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from collie_core.engine.zero3 import Zero3Store
from collie_core.errors import RunError
from collie_core.model.build import architecture
from collie_core.model.part import part_of
from collie_core.model.stages import stage_of
from collie_core.model.weights import ShardReader, assign
from collie_core.plan.extend import Trace, extended
from collie_core.plan.fake import fake_rank
from collie_core.plan.held import held, weights
from collie_core.plan.layers import set_layers
from collie_core.plan.rehearse import Moment, RehearsedParts, rehearse
from collie_core.plan.trace import MemoryTrace, Peak, Section
from collie_core.plan.work import Work
from collie_core.topology import Topology

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch.optim import Optimizer

    from collie_core.config.run import RunConfig
    from collie_core.data.loader import Batch
    from collie_core.model.weights import Read, Store


@dataclass(frozen=True)
class RankPrediction:
    """What a rank is predicted to hold."""

    peaks: dict[str, Peak]  # of each phase
    twins: tuple[int, ...]  # for each tensor-parallel rank the first one that holds tensors of the same shapes
    layers: tuple[int, int] | None = None  # of the two traces that it is read from; None: of one with all

    @property
    def peak(self) -> Peak:
        """Of the whole step, and of the building of the engine before it."""
        return max(self.peaks.values(), key=lambda peak: peak.total)


def predict_rank(config: RunConfig, rank: int, world_size: int, *, granularity: int = 1) -> RankPrediction:
    """The peaks of a training step on one rank. For a process that ends with it; see `fake_rank`.

    Args:
        config: of the run.
        rank, world_size: the rank, and the number of all.
        granularity: see `MemoryTrace`.

    Raises:
        CollieError: the run cannot be, or not be planned.
    """
    trace = MemoryTrace(granularity)
    parts = _rehearsed(config, rank, world_size, trace)
    return RankPrediction(trace.peaks(), _twins(parts))


@dataclass(frozen=True)
class RankTrace:
    """What a rank of a model with few layers held at every operation, and what it did in each of its steps."""

    sections: list[Section]
    steps: tuple[Work, Work]
    twins: tuple[int, ...]  # as in `RankPrediction`


def trace_rank(config: RunConfig, rank: int, world_size: int, granularity: int, layers: int | None) -> RankTrace:
    """See `predict_rank`; each pipeline stage has so many layers, whatever the model has."""
    trace = MemoryTrace(granularity, work=Work())
    steps: list[Work] = []

    def reached(moment: Moment) -> None:
        if moment in ("engine", "updated"):
            assert trace.work is not None
            steps.append(trace.work)
            trace.work = Work()

    parts = _rehearsed(config, rank, world_size, trace, layers, reached)
    return RankTrace(trace.sections(), (steps[1], steps[2]), _twins(parts))


def extended_peaks(
    config: RunConfig, low: RankTrace, high: RankTrace, depths: tuple[int, int], size: int
) -> dict[str, Peak]:
    """The peaks of each phase with `size` layers, from two alike traces of a rank with so few."""
    few, more = (Trace(depth, each.sections) for depth, each in zip(depths, (low, high), strict=True))
    return extended(few, more, size, bounded=config.parallel.zero_stage == 3)


def _rehearsed(
    config: RunConfig,
    rank: int,
    world_size: int,
    trace: MemoryTrace,
    layers: int | None = None,
    reached: Callable[[Moment], None] = lambda moment: None,
) -> FakeParts:
    """Two steps of a rank under a trace."""
    _require_plannable(config)
    zero = config.parallel.zero_stage > 0
    with fake_rank(rank, world_size, trace, packing=config.data.packing, zero=zero):
        parts = FakeParts(config, layers)
        follower = _Follower(parts, trace)
        for moment in rehearse(parts):
            follower.reached(moment)
            reached(moment)
        return parts


def _require_plannable(config: RunConfig) -> None:
    """Refuse what fake tensors cannot tell.

    Raises:
        RunError: tensors would lie in host memory, or in a form that only a GPU makes.
    """
    parallel = config.parallel
    for key, value in (("offload_optimizer", parallel.offload_optimizer), ("offload_param", parallel.offload_param)):
        if value:
            raise RunError(
                f"parallel.{key}=true cannot be planned: the trace does not tell memory of the device from that of the "
                f"host; plan with parallel.{key}=false for what the device holds at most"
            )
    if config.model.quantization is not None:
        raise RunError(
            f"model.quantization={config.model.quantization} cannot be planned: its weights take their form on a GPU "
            "alone; plan with model.quantization=null for what the device holds at most"
        )


def _twins(parts: FakeParts) -> tuple[int, ...]:
    part, size = part_of(parts.model), parts.topology.tp.size
    if part is None:
        return tuple(range(size))
    placements = part.partition.placements.values()
    shapes = [[placement.local_shape(size, rank) for placement in placements] for rank in range(size)]
    return tuple(shapes.index(own) for own in shapes)


class _Topology(Topology):
    """Where this rank stands among others that are not there, and are taken to be in the same state."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")  # fake tensors need no other

    def gather_objects(self, value: Any) -> list[Any]:
        return [value] * self.world_size

    def sum_over_data(self, value: int | float) -> int | float:
        return value * self.dp.size


class FakeParts(RehearsedParts):
    """Without the values of weights, and without their files.

    Args:
        config: of the run.
        layers: how many each pipeline stage has; None: as the model is.
    """

    def __init__(self, config: RunConfig, layers: int | None = None) -> None:
        if layers is not None:
            cuts = {"pipeline_cuts": [layers] * config.parallel.pipeline_parallel_size}
            config = config.model_copy(update={"parallel": config.parallel.model_copy(update=cuts)})
        super().__init__(config)
        self.layers = layers
        stands = {each.name: getattr(self.topology, each.name) for each in fields(Topology)}
        self.topology = _Topology(**stands)
        self.device = self.topology.device

    def _stock_model(self) -> nn.Module:
        family, config = architecture(self.config.model, self.registry, self.tokenizer)
        if self.vocabulary is not None:
            config.vocab_size = self.vocabulary.size
        if self.layers is not None:
            set_layers(config, self.layers * self.topology.pp.size)
        config.dtype = self._weights_dtype()
        config._attn_implementation = self.config.model.attn_implementation
        arguments: dict[str, Any] = {"config": config, "weights": None, "vocabulary": None}
        arguments |= {"topology": self.topology, "parallel": self.config.parallel, "store": self._store()}
        return cast(nn.Module, self.registry.build_target("model", family, **arguments))

    def _new_model(self) -> nn.Module:
        model = super()._new_model()
        stage = stage_of(model)
        for loan in () if stage is None else stage.loans:  # else the first stage would say it
            loan.wants_gradient = self.config.adapter is None
        return model

    def _optimizer(self) -> Optimizer:
        if self.topology.pp.size > 1:
            names = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
            self.config = _with_matching_groups(self.config, names)
        return super()._optimizer()

    def _scheduler(self, optimizer: Optimizer) -> LRScheduler:
        """A rate of 1: no tensor hangs on the schedule, and the library of schedules takes seconds to load."""
        return LambdaLR(optimizer, lambda step: 1.0)

    def _store(self) -> Store:
        found = super()._store()
        if isinstance(found, Zero3Store):
            found.__class__ = _EmptyZero3Store
        return found or _put_empty


def _with_matching_groups(config: RunConfig, names: Sequence[str]) -> RunConfig:
    """Without the parameter groups of other stages, which a run looks for on all of them."""
    section = config.optimizer
    groups = [group for group in section.param_groups if any(fnmatchcase(name, group.match) for name in names)]
    return config.model_copy(update={"optimizer": section.model_copy(update={"param_groups": groups})})


def _put_empty(module: nn.Module, name: str, shape: tuple[int, ...], read: Read) -> None:
    """A `Store` of parameters without values."""
    assert isinstance(read, ShardReader)
    assign(module, name, shape, lambda rows: torch.empty(shape, dtype=read.dtype))


class _EmptyZero3Store(Zero3Store):
    """Leaves the shares of ranks without values."""

    def _fill(self, parameter: nn.Parameter, shape: tuple[int, ...], read: Read) -> None:
        pass


class _Follower:
    """Tells the trace what tensors are for, and which phase of a step it is."""

    def __init__(self, parts: FakeParts, trace: MemoryTrace) -> None:
        self.parts = parts
        self.trace = trace

    def reached(self, moment: Moment) -> None:
        """See `rehearse`."""
        if moment == "model":
            self._follow_model(self.parts.model)
            self.trace.begin()
        elif moment == "engine":
            self._follow_backward(self.parts.step)
        elif moment == "gradients":
            self.trace.mark([parameter.grad for parameter in self.parts.model.parameters()], "gradients")
            self.trace.phase = "update"
        self._mark_engine()

    def _follow_model(self, model: nn.Module) -> None:
        self.trace.mark(weights(model), "weights")
        self.trace.vocabularies |= _rows_of_head(model)
        model.register_forward_pre_hook(lambda *_: setattr(self.trace, "phase", "forward"))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._has_gradient)

    def _has_gradient(self, parameter: Tensor) -> None:
        self.trace.mark([parameter.grad], "gradients")
        self._mark_held()  # some of it is gone again when backward has ended

    def _follow_backward(self, step: Any) -> None:
        """A context is entered when backward begins, as before a forward, which then says so itself."""
        around = step.around

        def noted(batch: Batch) -> AbstractContextManager[Any]:
            self.trace.phase = "backward"
            return cast("AbstractContextManager[Any]", around(batch))

        step.around = noted

    def _mark_engine(self) -> None:
        """Weights as the engine has them, and what the optimizer keeps: state, and copies of weights to work on."""
        for component, tensors in held(self.parts) if self.parts.training else ():
            self.trace.mark(tensors, component)

    def _mark_held(self) -> None:
        of_engine = getattr(self.parts.step.states, "held", None)  # of ZeRO
        for component, tensors in of_engine().items() if of_engine is not None else ():
            self.trace.mark(tensors, component)


def _rows_of_head(model: Any) -> set[int]:
    """The last dimension of this rank's logits; nothing on a stage without them."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weight = getattr(head, "weight", None)
    return set() if weight is None else {getattr(weight, "ds_shape", weight.shape)[0]}
