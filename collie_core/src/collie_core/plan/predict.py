"""The memory of a rank, predicted: its steps are taken on fake tensors, and the peak is read from their trace."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from collie_core.plan.fake import GPU, fake_rank
from collie_core.plan.held import held, weights
from collie_core.plan.layers import set_layers
from collie_core.plan.rehearse import Moment, RehearsedParts, rehearse
from collie_core.plan.trace import HOST, WHERE, MemoryTrace, Peak, Section, Where
from collie_core.plan.work import Work
from collie_core.topology import Topology

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch.optim import Optimizer

    from collie_core.config.run import RunConfig
    from collie_core.data.loader import Batch
    from collie_core.model.weights import Read, Store

Peaks = dict[Where, dict[str, Peak]]
"""Of each memory, and each phase."""

GPU_GRANULARITY = 512  # bytes; torch/c10: CUDACachingAllocator, kMinBlockSize


@dataclass(frozen=True)
class RankPrediction:
    """What a rank is predicted to hold."""

    peaks: Peaks
    twins: tuple[int, ...]  # for each tensor-parallel rank the first one that holds tensors of the same shapes
    layers: tuple[int, int] | None = None  # of the two traces that it is read from; None: of one with all

    @property
    def peak(self) -> Peak:
        """Of the whole step, and of the building of the engine before it."""
        return highest(self.peaks["device"])

    @property
    def host_peak(self) -> Peak:
        """The same of host memory."""
        return highest(self.peaks["host"])


def highest(peaks: Mapping[str, Peak]) -> Peak:
    """Of all phases."""
    return max(peaks.values(), key=lambda peak: peak.total)


def predict_rank(config: RunConfig, rank: int, world_size: int, *, gpu: bool = False) -> RankPrediction:
    """The peaks of a training step on one rank. For a process that ends with it; see `fake_rank`.

    Args:
        config: of the run.
        rank, world_size: the rank, and the number of all.
        gpu: whether its device is a GPU, with memory of its own.

    Raises:
        CollieError: the run cannot be, or not be planned.
    """
    trace = _trace(gpu, rounds_pinned=True)
    parts = _rehearsed(config, rank, world_size, trace)
    return RankPrediction({where: trace.peaks(where) for where in WHERE}, _twins(parts))


@dataclass(frozen=True)
class RankTrace:
    """What a rank of a model with few layers held at every operation, and what it did in each of its steps."""

    sections: list[Section]
    steps: tuple[Work, Work]
    twins: tuple[int, ...]  # as in `RankPrediction`


def trace_rank(config: RunConfig, rank: int, world_size: int, layers: int | None, *, gpu: bool) -> RankTrace:
    """See `predict_rank`; each pipeline stage has so many layers, whatever the model has."""
    trace = _trace(gpu, rounds_pinned=layers is None)  # what is rounded does not grow alike with each layer
    trace.work = Work()
    steps: list[Work] = []

    def reached(moment: Moment) -> None:
        if moment in ("engine", "updated"):
            assert trace.work is not None
            steps.append(trace.work)
            trace.work = Work()

    parts = _rehearsed(config, rank, world_size, trace, layers, reached)
    return RankTrace(trace.sections(), (steps[1], steps[2]), _twins(parts))


def extended_peaks(config: RunConfig, low: RankTrace, high: RankTrace, depths: tuple[int, int], size: int) -> Peaks:
    """The peaks of each phase with `size` layers, from two alike traces of a rank with so few."""
    few, more = (Trace(depth, each.sections) for depth, each in zip(depths, (low, high), strict=True))
    bounded = config.parallel.zero_stage == 3
    return {where: extended(few, more, size, where, bounded=bounded) for where in WHERE}


def _trace(gpu: bool, *, rounds_pinned: bool) -> MemoryTrace:
    return MemoryTrace(GPU_GRANULARITY, GPU, rounds_pinned) if gpu else MemoryTrace()


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
        parts = FakeParts(config, layers, trace.device)
        follower = _Follower(parts, trace)
        for moment in rehearse(parts):
            follower.reached(moment)
            reached(moment)
        return parts


def _require_plannable(config: RunConfig) -> None:
    """Refuse what fake tensors cannot tell.

    Raises:
        RunError: tensors would lie in a form that only a GPU makes.
    """
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


@dataclass(frozen=True)
class _Topology(Topology):
    """Where this rank stands among others that are not there, and are taken to be in the same state."""

    own_device: torch.device = HOST

    @property
    def device(self) -> torch.device:
        return self.own_device

    def gather_objects(self, value: Any) -> list[Any]:
        return [value] * self.world_size

    def sum_over_data(self, value: int | float) -> int | float:
        return value * self.dp.size


class FakeParts(RehearsedParts):
    """Without the values of weights, and without their files.

    Args:
        config: of the run.
        layers: how many each pipeline stage has; None: as the model is.
        device: of its tensors.
    """

    def __init__(self, config: RunConfig, layers: int | None = None, device: torch.device = HOST) -> None:
        if layers is not None:
            cuts = {"pipeline_cuts": [layers] * config.parallel.pipeline_parallel_size}
            config = config.model_copy(update={"parallel": config.parallel.model_copy(update=cuts)})
        super().__init__(config)
        self.layers = layers
        stands = {each.name: getattr(self.topology, each.name) for each in fields(Topology)}
        self.topology = _Topology(**stands, own_device=device)
        self.device = device

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
