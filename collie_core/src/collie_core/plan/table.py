"""The strategies with which a run would fit, ranked by the speed that a stated model of the hardware gives them.

Every strategy is traced, as a plan is. Where the layers of a model are alike, two traces with a few of them stand for
the whole; see `extend`.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch

from collie_core.data.tokenizer import build_tokenizer
from collie_core.errors import CollieError
from collie_core.plan.children import each_in_child
from collie_core.plan.extend import alike
from collie_core.plan.hardware import COMPUTE_SHARE, LINK_SHARE, MEMORY_SHARE, Hardware
from collie_core.plan.layers import Layers, layers_of
from collie_core.plan.plan import Place, Plan, Shape, make_plan
from collie_core.plan.predict import Peaks, RankTrace, extended_peaks, highest, trace_rank
from collie_core.plan.remedy import Changes, Load
from collie_core.plan.trace import WHERE, Peak
from collie_core.plan.work import Work, extended_work

if TYPE_CHECKING:
    from collie_core.config.run import RunConfig

LARGEST_MICRO_BATCH = 8
OFFLOADS = ((), ("optimizer",), ("optimizer", "param"))

Choice = tuple[tuple[str, str], ...]
"""An optimizer and an adapter, where several are compared, as overrides."""


@dataclass(frozen=True)
class Strategy:
    """How a run could be laid out."""

    shape: Shape
    zero_stage: int
    checkpointing: str
    micro_batch: int
    accumulation: int
    offload: tuple[str, ...] = ()  # of OFFLOADS
    choices: Choice = ()

    @property
    def changes(self) -> Changes:
        """As overrides of the configuration."""
        return {
            "parallel.tensor_parallel_size": self.shape.tp,
            "parallel.pipeline_parallel_size": self.shape.pp,
            "parallel.data_parallel_size": self.shape.dp,
            "parallel.zero_stage": self.zero_stage,
            **{f"parallel.offload_{what}": str(what in self.offload).lower() for what in OFFLOADS[-1]},
            "model.gradient_checkpointing": self.checkpointing,
            "train.per_device_train_batch_size": self.micro_batch,
            "train.gradient_accumulation_steps": self.accumulation,
            **dict(self.choices),
        }


@dataclass(frozen=True)
class Ranked:
    """A strategy that fits."""

    strategy: Strategy
    peak: Peak  # of the rank that holds the most
    host: int  # bytes of host memory, of the rank that holds the most there
    step_s: float
    tokens_per_s: float  # of all GPUs together
    layers_traced: tuple[int, int] | None  # of each stage in the two traces; None: all in one


@dataclass(frozen=True)
class Table:
    """What fits, the fastest first, and the whole plan of that one."""

    ranked: tuple[Ranked, ...]
    plan: Plan | None  # None: nothing fits
    tried: int


@dataclass(frozen=True)
class Machines:
    """The GPUs that a table is made for."""

    hardware: Hardware
    gpus: int
    nodes: int
    memory: int  # bytes of each GPU
    host_memory: int | None = None  # bytes of each node, for what is offloaded; None: as much as is needed

    @property
    def per_node(self) -> int:
        """GPUs of one node."""
        return self.gpus // self.nodes

    def seconds(self, work: Work, dtype: str) -> float:
        """For what one rank computes and exchanges, one after the other."""
        flops = self.hardware.flops_float32 if dtype == "float32" else self.hardware.flops
        found = work.flops / (flops * COMPUTE_SHARE) + work.moved / (self.hardware.host_link * LINK_SHARE)
        for ranks, nbytes in work.sent.items():
            one_node = len({rank // self.per_node for rank in ranks}) == 1
            found += nbytes / ((self.hardware.link if one_node else self.hardware.network) * LINK_SHARE)
        return found

    def holds(self, peak: Peak, host: int) -> bool:
        """Whether ranks fit that hold so much."""
        return peak.total <= self.memory and (self.host_memory is None or host * self.per_node <= self.host_memory)


def make_table(load: Load, machines: Machines, choices: Sequence[Choice] = ((),)) -> Table:
    """Trace the strategies for so many GPUs. For a process that does nothing else: it loads what its children need.

    Args:
        load: gives the configuration of the run with changes.
        machines: the GPUs.
        choices: optimizers and adapters to compare, as overrides.

    Raises:
        CollieError: the run as it is cannot be.
    """
    search = _Search(load, machines)
    found: list[Ranked] = []
    for offload in OFFLOADS:  # where nothing fits with less of it
        fitting = {(one.strategy.shape, one.strategy.choices) for one in found}
        found += search.climb([one for choice in choices for one in search.smallest(choice, offload, fitting)])
    grown = [one for one in found if one.strategy.zero_stage == 3]
    while grown:  # each micro-batch gathers all parameters
        grown = search.fitting([larger for one in grown for larger in search.with_twice_the_rows(one.strategy)])
        found += grown
    found.sort(key=lambda one: (-one.tokens_per_s, one.peak.total))
    while found:  # the first is planned in whole
        plan = make_plan(load(found[0].strategy.changes), machines.gpus, gpu=True)
        peak, host = plan.largest.prediction.peak, max(plan.host.values()) if plan.offloads else 0
        if machines.holds(peak, host):
            found[0] = replace(found[0], peak=peak, host=host, layers_traced=None)
            return Table(tuple(found), plan, search.tried)
        del found[0]
    return Table((), None, search.tried)


class _Search:
    """Traces strategies, many at a time."""

    def __init__(self, load: Load, machines: Machines) -> None:
        self.load = load
        self.machines = machines
        self.config = load({})
        self.samples = self.config.batch_sizes(Shape.of(self.config, machines.gpus).dp).total
        self.tokenizer: Any = build_tokenizer(self.config.tokenizer, self.config.model)
        self.tried = 0
        self._warm: set[tuple[bool, bool]] = set()  # with and without ZeRO and an adapter: traced in this process
        self._layers: dict[tuple[int, int], Layers | None] = {}
        self._configs: dict[Strategy, RunConfig] = {}

    # -- what to try -----------------------------------------------------------------------------------------------

    def smallest(self, choice: Choice, offload: tuple[str, ...], without: Collection[Any]) -> Iterator[Strategy]:
        """Each strategy that is not refused, with the fewest rows in a micro-batch that it may have.

        Args:
            choice: of optimizer and adapter.
            offload: one of `OFFLOADS`.
            without: shapes, each with a choice, that are left out.
        """
        for shape in (shape for shape in self._shapes() if (shape, choice) not in without):
            each_rank = self.samples // shape.dp
            for zero_stage, checkpointing in product(_stages(shape, offload), ("full", "none")):
                sizes = [size for size in (2**power for power in range(32)) if each_rank % size == 0]
                tried = (
                    Strategy(shape, zero_stage, checkpointing, size, each_rank // size, offload, choice)
                    for size in dict.fromkeys([*sizes, each_rank])
                )
                if found := next(filter(self._allowed, tried), None):
                    yield found

    def worth_while(self, strategy: Strategy, found: Sequence[Ranked], too_large: Collection[Strategy]) -> bool:
        """Not where it cannot fit, nor ZeRO 2 and 3 where a lower stage of ZeRO fits, which exchanges less."""
        if replace(strategy, checkpointing="full") in too_large:
            return False
        lower = (one.strategy for one in found if 0 < one.strategy.zero_stage < strategy.zero_stage)
        return not any(replace(one, zero_stage=strategy.zero_stage) == strategy for one in lower)

    def with_twice_the_rows(self, strategy: Strategy) -> Iterator[Strategy]:
        """The same with larger micro-batches, if there can be any."""
        rows, rest = 2 * strategy.micro_batch, strategy.accumulation % 2
        larger = replace(strategy, micro_batch=rows, accumulation=strategy.accumulation // 2)
        if rest == 0 and rows <= LARGEST_MICRO_BATCH and self._allowed(larger):
            yield larger

    def _shapes(self) -> Iterator[Shape]:
        gpus = self.machines.gpus
        for tp in (size for size in range(1, self.machines.per_node + 1) if self.machines.per_node % size == 0):
            for pp in (size for size in range(1, gpus // tp + 1) if gpus // tp % size == 0):
                shape = Shape(tp, pp, gpus // (tp * pp))
                if self.samples % shape.dp == 0:
                    yield shape

    def _allowed(self, strategy: Strategy) -> bool:
        try:
            self.layers(self.config_with(strategy))
        except CollieError:  # what is refused is no strategy
            return False
        return True

    def config_with(self, strategy: Strategy) -> RunConfig:
        """That of the run; making one takes as long as many operations of a trace."""
        if strategy not in self._configs:
            self._configs[strategy] = self.load(strategy.changes)
        return self._configs[strategy]

    def layers(self, config: RunConfig) -> Layers | None:
        """Of the model as a strategy cuts it."""
        sizes = config.parallel.tensor_parallel_size, config.parallel.pipeline_parallel_size
        if sizes not in self._layers:
            self._layers[sizes] = layers_of(config, self.tokenizer)
        return self._layers[sizes]

    # -- what fits -------------------------------------------------------------------------------------------------

    def climb(self, known: Sequence[Strategy]) -> list[Ranked]:
        """Those that fit, tried from what exchanges and computes least, so that most of the others need no trace."""
        found: list[Ranked] = []
        too_large: set[Strategy] = set()
        for checkpointing in ("full", "none"):  # what does not fit with it does not fit without it either
            for stage in range(4):
                rung = [one for one in known if (one.checkpointing, one.zero_stage) == (checkpointing, stage)]
                tried = [one for one in rung if self.worth_while(one, found, too_large)]
                fitting = self.fitting(tried)
                too_large |= set(tried) - {one.strategy for one in fitting}
                found += fitting
        return found

    def fitting(self, strategies: Sequence[Strategy]) -> list[Ranked]:
        """Those that fit, with their speed."""
        ranked: list[Ranked | None] = []
        left = list(strategies)
        for whole in (False, True):  # in whole those of which few layers do not stand for many
            jobs = [_Job.of(strategy, self.config_with(strategy), self, whole=whole) for strategy in left]
            for job in jobs:
                self._warm_up(job)
            found = iter(each_in_child(_trace, [call for job in jobs for call in job.calls]))
            traced = [(job, [next(found) for _ in job.calls]) for job in jobs]
            left = [job.strategy for job, traces in traced if job.unlike(traces)]
            ranked += [job.ranked(traces, self.machines) for job, traces in traced if not job.unlike(traces)]
        self.tried += len(ranked)
        return [one for one in ranked if one is not None and self.machines.holds(one.peak, one.host)]

    def _warm_up(self, job: _Job) -> None:
        """Trace in this process what its children will, so that they find everything loaded, and operations known.

        Not where there are GPUs, since the threads that backward has for them do not survive a fork.
        """
        kind = job.strategy.zero_stage > 0, job.config.adapter is not None
        if kind not in self._warm and not torch.cuda.is_available():
            self._warm.add(kind)
            with patch.dict(os.environ, {"DS_ACCELERATOR": "cpu"}):  # as in the children
                _trace(*job.calls[0])


def _trace(config: RunConfig, rank: int, gpus: int, layers: int | None) -> RankTrace | None:
    try:
        return trace_rank(config, rank, gpus, layers, gpu=True)
    except CollieError:  # what is refused when the model stands is no strategy either
        return None


@dataclass(frozen=True)
class _Job:
    """The traces of one strategy: its first and its last pipeline stage, each with few layers and with some more."""

    strategy: Strategy
    config: RunConfig
    calls: list[tuple[RunConfig, int, int, int | None]]
    stages: list[int]
    depths: tuple[int, int] | None  # layers; None: one trace with all
    of_stage: tuple[int, ...]

    @classmethod
    def of(cls, strategy: Strategy, config: RunConfig, search: _Search, *, whole: bool) -> _Job:
        """With all layers when the `whole` model is to be traced, or few of them do not stand for it."""
        shape, layers = strategy.shape, search.layers(config)
        depths = None if layers is None or whole else layers.depths(config, shape.dp)
        stages = sorted({0, shape.pp - 1})
        ranks = [shape.rank(Place(stage, 0, 0)) for stage in stages]
        calls = [(config, rank, shape.processes, depth) for rank in ranks for depth in depths or (None,)]
        return cls(strategy, config, calls, stages, depths, () if layers is None else layers.of_stage)

    def ranked(self, traces: Sequence[RankTrace | None], machines: Machines) -> Ranked | None:
        """The strategy with its memory and speed; None: refused."""
        known = [trace for trace in traces if trace is not None]
        if len(known) < len(traces):
            return None
        each = len(traces) // len(self.stages)
        of_stages = [
            self._stage(stage, known[number * each : (number + 1) * each]) for number, stage in enumerate(self.stages)
        ]
        seconds = max(self._seconds(peaks, steps, machines) for peaks, steps in of_stages)
        most = [{where: highest(peaks[where]) for where in WHERE} for peaks, _ in of_stages]
        peak = max((each["device"] for each in most), key=lambda peak: peak.total)
        host = max(each["host"].total for each in most) if self.strategy.offload else 0
        tokens = self.config.batch_sizes(self.strategy.shape.dp).total * self.config.data.max_length
        return Ranked(self.strategy, peak, host, seconds, tokens / seconds, self.depths)

    def unlike(self, traces: Sequence[RankTrace | None]) -> bool:
        """Whether few layers do not stand for many."""
        pairs = zip(traces[::2], traces[1::2], strict=True) if self.depths is not None else ()
        return any(
            low is not None and high is not None and not alike(low.sections, high.sections) for low, high in pairs
        )

    def _stage(self, stage: int, traces: Sequence[RankTrace]) -> tuple[Peaks, tuple[Work, Work]]:
        """Peaks, and the work of both steps."""
        if self.depths is None:
            (whole,) = traces
            return extended_peaks(self.config, whole, whole, (1, 2), 1), whole.steps
        low, high = traces
        size, (few, more) = self.of_stage[stage], self.depths
        peaks = extended_peaks(self.config, low, high, self.depths, size)
        times = (size - few) / (more - few)
        first, second = (extended_work(*steps, times) for steps in zip(low.steps, high.steps, strict=True))
        return peaks, (first, second)

    def _seconds(self, peaks: Peaks, steps: tuple[Work, Work], machines: Machines) -> float:
        """Of a step: of its micro-batches, with the bubble of the pipeline, and of what is done once."""
        pp, number = self.strategy.shape.pp, self.strategy.accumulation
        traced = min(number, 2 if pp == 1 else pp + 1)
        first, second = steps
        once, each = Work(), second.times(1 / traced)
        if traced > 1 and first.flops < second.flops:
            each = _difference(second, first).times(1 / (traced - 1))
            once = _difference(first, each)
        dtype = self.config.model.dtype
        speeds = {"device": machines.hardware.memory_speed, "host": machines.hardware.host_memory_speed}
        update = sum(_touched(peaks[where]) / (speeds[where] * MEMORY_SHARE) for where in WHERE)
        return machines.seconds(each, dtype) * (number + pp - 1) + machines.seconds(once, dtype) + update


def _touched(peaks: Mapping[str, Peak]) -> int:
    """Bytes that an update reads and writes."""
    held = peaks["update"].components if "update" in peaks else {}
    return 2 * sum(held.get(name, 0) for name in ("weights", "gradients", "optimizer state"))


def _stages(shape: Shape, offload: tuple[str, ...]) -> Sequence[int]:
    """Of ZeRO, that share something among the copies, or offload it."""
    if "param" in offload:
        return [3]
    return range(1, 4) if offload else range(4 if shape.dp > 1 else 1)


def _difference(more: Work, less: Work) -> Work:
    sent = {ranks: max(0, nbytes - less.sent[ranks]) for ranks, nbytes in more.sent.items()}
    return Work(max(0, more.flops - less.flops), type(more.sent)(sent), max(0, more.moved - less.moved))
