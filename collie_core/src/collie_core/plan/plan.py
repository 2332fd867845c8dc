"""The plan of a run: what each of its ranks will hold, and whether that fits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.distributed as dist

from collie_core.config.rules import require_parts
from collie_core.data.tokenizer import build_tokenizer
from collie_core.errors import RunError
from collie_core.plan.children import each_in_child
from collie_core.plan.extend import alike
from collie_core.plan.layers import Layers, layers_of
from collie_core.plan.predict import RankPrediction, RankTrace, extended_peaks, predict_rank, trace_rank

if TYPE_CHECKING:
    from collie_core.config.run import RunConfig


@dataclass(frozen=True)
class Shape:
    """Sizes of the axes of a run, and of its batch."""

    tp: int
    pp: int
    dp: int

    @classmethod
    def of(cls, config: RunConfig, processes: int) -> Shape:
        """For so many processes.

        Raises:
            RunError: the sizes of `parallel` do not multiply to their number.
        """
        tp, pp = config.parallel.tensor_parallel_size, config.parallel.pipeline_parallel_size
        wanted, (copies, rest) = config.parallel.data_parallel_size, divmod(processes, tp * pp)
        if rest or copies == 0 or wanted not in ("auto", copies):
            needed = config.parallel.fewest_processes
            raise RunError(
                f"tensor_parallel_size={tp}, pipeline_parallel_size={pp} and data_parallel_size={wanted} do not make "
                f"{processes} processes; plan for {needed}{' or a multiple of it' if wanted == 'auto' else ''}"
            )
        return cls(tp, pp, copies)

    @property
    def processes(self) -> int:
        """How many there are."""
        return self.tp * self.pp * self.dp

    def rank(self, place: Place) -> int:
        """The number of a process; see `Topology`."""
        return (place.stage * self.dp + place.dp) * self.tp + place.tp


class Place(NamedTuple):
    """Where a rank stands on each axis."""

    stage: int
    dp: int
    tp: int


@dataclass(frozen=True)
class Kind:
    """Ranks that hold the same."""

    ranks: tuple[int, ...]
    stage: int
    prediction: RankPrediction

    @property
    def predicted(self) -> int:
        """Bytes at the peak."""
        return self.prediction.peak.total


@dataclass(frozen=True)
class Plan:
    """What all ranks of a run are predicted to hold."""

    shape: Shape
    dtype: str
    batch: str
    kinds: tuple[Kind, ...]
    offloads: bool = False  # from the memory of GPUs to that of the host

    @property
    def largest(self) -> Kind:
        """The ranks that hold the most."""
        return max(self.kinds, key=lambda kind: kind.predicted)

    @property
    def predicted(self) -> dict[int, int]:
        """Bytes at the peak of each rank."""
        return {rank: kind.predicted for kind in self.kinds for rank in kind.ranks}

    @property
    def host(self) -> dict[int, int]:
        """The same of host memory: from when the model stands on."""
        return {rank: kind.prediction.host_peak.total for kind in self.kinds for rank in kind.ranks}


def make_plan(config: RunConfig, processes: int, *, gpu: bool) -> Plan:
    """Predict every kind of rank of a run: each stage, and each place along the tensor-parallel axis that differs.

    Data-parallel ranks hold the same, except with ZeRO 1 and 2, where the first and the last are predicted. Every
    prediction runs in a process of its own.

    Args:
        config: of the run, with the precision that it will have.
        processes: their number.
        gpu: whether tensors will lie in the memory of GPUs, where they are rounded up.

    Raises:
        CollieError: the run cannot be, or not be planned.
    """
    shape = _shape(config, processes)
    predict = _Predictor(config, shape, gpu=gpu)
    copies = [0]
    if config.parallel.zero_stage in (1, 2) and shape.dp > 1:
        copies.append(shape.dp - 1)  # they own the ends of flat tensors, and send on the rest at other moments
    found = predict([Place(stage, dp, 0) for stage in range(shape.pp) for dp in copies])
    found |= predict([place._replace(tp=tp) for place, first in found.items() for tp in sorted({*first.twins} - {0})])
    kinds = (
        Kind(tuple(sorted(map(shape.rank, places))), place.stage, found[place])
        for place in sorted(found)
        if (places := list(_alike(place, found, shape)))
    )
    return _plan(config, shape, kinds, gpu=gpu)


def passes_at_least(config: RunConfig, processes: int, *, gpu: bool) -> Plan | None:
    """What ranks hold in forward and backward alone, from a few layers, where a whole plan takes all; else None.

    The last data-parallel rank and further tensor-parallel ones are not looked at. Arguments and errors are those of
    `make_plan`.
    """
    shape = _shape(config, processes)
    if config.parallel.zero_stage < 3:  # few layers stand for a whole plan, or not even for these
        return None
    predict = _Predictor(config, shape, gpu=gpu)
    found = predict.passes([Place(stage, 0, 0) for stage in range(shape.pp)])
    kinds = (Kind((shape.rank(place),), place.stage, prediction) for place, prediction in found.items())
    return _plan(config, shape, kinds, gpu=False) if found else None  # nothing is known of host memory


def _shape(config: RunConfig, processes: int) -> Shape:
    if dist.is_initialized():
        raise RunError(
            "the processes of a plan cannot be forked beside a process group: plan before the run, or by `collie plan`"
        )
    require_parts(config, model=False, train_data=True)
    return Shape.of(config, processes)


def _plan(config: RunConfig, shape: Shape, kinds: Iterable[Kind], *, gpu: bool) -> Plan:
    batch = str(config.batch_sizes(shape.dp))
    return Plan(shape, config.model.dtype, batch, tuple(kinds), gpu and config.parallel.offloads)


class _Predictor:
    """Predicts ranks, in a process each; from a few layers where these stand for all."""

    def __init__(self, config: RunConfig, shape: Shape, *, gpu: bool) -> None:
        self.config = config
        self.shape = shape
        self.gpu = gpu
        self.layers: Layers | None = None
        self.depths: tuple[int, int] | None = None  # of the two traces; None: of one with all layers
        if config.parallel.zero_stage not in (1, 2):  # whose buckets let a few only nearly stand for all
            self.layers = layers_of(config, build_tokenizer(config.tokenizer, config.model))
        if self.layers is not None and not (gpu and config.parallel.offloads):  # whose pinned memory has its own sizes
            self.depths = self.layers.depths(config, shape.dp)

    def __call__(self, places: Sequence[Place]) -> dict[Place, RankPrediction]:
        found = {} if self.depths is None else self._from_few(places, self.depths)
        return found or dict(zip(places, self._each(_predict, places, (None,)), strict=True))

    def passes(self, places: Sequence[Place]) -> dict[Place, RankPrediction]:
        """Forward and backward on the device, where a few layers stand for all of them, and not of the rest."""
        depths = None if self.layers is None or self.depths is not None else self.layers.depths_of_passes(self.config)
        found = {} if depths is None else self._from_few(places, depths)
        for place, prediction in found.items():
            passes = {phase: prediction.peaks["device"][phase] for phase in ("forward", "backward")}
            found[place] = replace(prediction, peaks={"device": passes, "host": {}})
        return found

    def _from_few(self, places: Sequence[Place], depths: tuple[int, int]) -> dict[Place, RankPrediction]:
        """Nothing when their traces are not alike."""
        assert self.layers is not None
        traces = self._each(_trace, places, depths)
        pairs = list(zip(traces[::2], traces[1::2], strict=True))
        if not all(alike(low.sections, high.sections) for low, high in pairs):
            return {}
        return {
            place: self._read(low, high, depths, self.layers.of_stage[place.stage])
            for place, (low, high) in zip(places, pairs, strict=True)
        }

    def _each(self, function: Callable[..., Any], places: Sequence[Place], depths: Sequence[int | None]) -> list[Any]:
        ranks = [self.shape.rank(place) for place in places]
        calls = [(self.config, rank, self.shape.processes, depth, self.gpu) for rank in ranks for depth in depths]
        return each_in_child(function, calls)

    def _read(self, low: RankTrace, high: RankTrace, depths: tuple[int, int], size: int) -> RankPrediction:
        return RankPrediction(extended_peaks(self.config, low, high, depths, size), low.twins, depths)


def _predict(config: RunConfig, rank: int, processes: int, _: None, gpu: bool) -> RankPrediction:
    return predict_rank(config, rank, processes, gpu=gpu)


def _trace(config: RunConfig, rank: int, processes: int, layers: int, gpu: bool) -> RankTrace:
    return trace_rank(config, rank, processes, layers, gpu=gpu)


def _alike(place: Place, found: Mapping[Place, RankPrediction], shape: Shape) -> Iterator[Place]:
    """The places that a prediction holds for. Copies that were not predicted are like the larger of those that were."""
    copies = {
        other.dp: found[other].peak.total for other in found if (other.stage, other.tp) == (place.stage, place.tp)
    }
    largest = max(copies, key=lambda dp: copies[dp])
    twins = found[place._replace(tp=0)].twins
    for dp in range(shape.dp):
        if place.dp == (dp if dp in copies else largest):
            yield from (Place(place.stage, dp, tp) for tp in range(shape.tp) if twins[tp] == place.tp)


def as_object(plan: Plan, measured: Sequence[int] | None) -> dict[str, Any]:
    """What `--json` prints."""
    kind_of = {rank: kind for kind in plan.kinds for rank in kind.ranks}
    ranks = []
    for rank, kind in sorted(kind_of.items()):
        peak = kind.prediction.peak
        own: dict[str, Any] = {
            "rank": rank,
            "stage": kind.stage,
            "predicted_peak_bytes": peak.total,
            "phase": peak.phase,
            "layers_traced": kind.prediction.layers or "all",
            "components": peak.components,
            "phases": {phase: found.total for phase, found in kind.prediction.peaks["device"].items()},
            "predicted_host_peak_bytes": kind.prediction.host_peak.total,
            "host_components": kind.prediction.host_peak.components,
        }
        if measured is not None:
            own["measured_peak_bytes"] = measured[rank]
        ranks.append(own)
    shape = plan.shape
    found = {
        "processes": shape.processes,
        "tensor_parallel_size": shape.tp,
        "pipeline_parallel_size": shape.pp,
        "data_parallel_size": shape.dp,
        "dtype": plan.dtype,
        "batch": plan.batch,
        "ranks": ranks,
        "predicted_peak_bytes": sum(plan.predicted.values()),
    }
    return found if measured is None else found | {"measured_peak_bytes": sum(measured)}
