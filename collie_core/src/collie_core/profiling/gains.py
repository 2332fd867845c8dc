"""What a run could win at most, from what was measured of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from collie_core.profiling.account import Profile, RankProfile

if TYPE_CHECKING:
    from collie_core.config.run import RunConfig

LEAST = 0.01  # of the step: less is not worth a change
MUCH_PADDING = 0.1  # of the tokens: more also explains why data-parallel ranks wait for each other

Changes = Mapping[str, Any]
Allowed = Callable[[Changes], bool]
"""Whether the configuration may be changed so."""


@dataclass(frozen=True)
class Gain:
    """The time of a step that would be saved if a part of it cost nothing: more is not to be had from that part."""

    share: float  # of the step
    measured: str  # what was
    changes: Changes  # keys of the configuration that lead there; none: it is not the configuration
    way: str  # what they do, or what to look at instead


def gains(profile: Profile, config: RunConfig, allowed: Allowed) -> list[Gain]:
    """All that are worth a change, the largest first. They overlap: their shares do not add up.

    Of those that the same change leads to, the largest stands for all.
    """
    found = sorted((gain for find in _ALL for gain in find(profile, config)), key=lambda gain: -gain.share)
    kept: list[Gain] = []
    for gain in found:
        known = gain.changes and gain.changes in [other.changes for other in kept]
        if gain.share >= LEAST and not known and (not gain.changes or allowed(gain.changes)):
            kept.append(gain)
    return kept


def _padding(profile: Profile, config: RunConfig) -> Iterator[Gain]:
    if config.data.packing:
        return
    seconds = profile.mean["forward"] + profile.mean["backward"]
    saved = 1 - profile.packed_tokens / profile.computed_tokens
    left = 1 - profile.tokens / profile.packed_tokens
    measured = f"{_percent(profile.padding)} of the tokens in forward and backward are padding, packed {_percent(left)}"
    way = "lay samples end to end into rows"
    yield Gain(saved * seconds / profile.step_s, measured, {"data.packing": True}, way)


def _data(profile: Profile, config: RunConfig) -> Iterator[Gain]:
    seconds = profile.most("data")
    measured = f"a rank waits {_time(seconds)} per step for its samples"
    workers = max(2, 2 * config.data.num_workers)
    way = "let other processes prepare batches ahead"
    yield Gain(seconds / profile.step_s, measured, {"data.num_workers": workers}, way)


def _communication(profile: Profile, config: RunConfig) -> Iterator[Gain]:
    parallel = config.parallel
    for axis, what in (("dp", "data-parallel"), ("tp", "tensor-parallel")):
        seconds = profile.along("communication", axis)
        measured = f"ranks exchange with their {what} neighbours for {_time(seconds)} per step, without waiting"
        if axis == "tp":
            changes: Changes = {"parallel.tensor_parallel_size": parallel.tensor_parallel_size // 2}
            way = "share layers among fewer ranks, which then hold more"
        elif parallel.zero_stage == 3:
            changes, way = {"parallel.zero_stage": 2}, "keep parameters whole, which takes more memory"
        else:
            changes, way = _larger_batch(config), "exchange gradients after more samples"
        yield Gain(seconds / profile.step_s, measured, changes, way)


def _bubble(profile: Profile, config: RunConfig) -> Iterator[Gain]:
    if config.parallel.pipeline_parallel_size == 1:
        return
    stages = config.parallel.pipeline_parallel_size
    seconds = profile.along("waiting", "pp")
    count = f"{profile.micro_batches} micro-batch{'' if profile.micro_batches == 1 else 'es'}"
    measured = f"stages wait {_time(seconds)} per step for each other, with {count} in a step"
    work = [_mean([_work(rank) for rank in profile.ranks if rank.stage == stage]) for stage in range(stages)]
    if max(work) - _mean(work) > seconds / 2:  # more of it comes from unequal stages than from filling the pipeline
        slowest = work.index(max(work))
        cuts = "uniform" if config.parallel.pipeline_cuts == "parameters" else "parameters"
        measured += f"; stage {slowest} works for {_time(max(work))}, the average one for {_time(_mean(work))}"
        way = "cut the layers in another way, or write the number of each stage as a list"
        yield Gain(seconds / profile.step_s, measured, {"parallel.pipeline_cuts": cuts}, way)
        return
    yield Gain(seconds / profile.step_s, measured, _larger_batch(config), "fill the pipeline for longer")


def _stragglers(profile: Profile, config: RunConfig) -> Iterator[Gain]:
    for axis in ("dp", "tp", "all"):
        seconds, late = profile.along("waiting", axis), profile.held_up_by(axis)
        measured = f"ranks wait {_time(seconds)} per step"
        measured += " for one another in turns" if late is None else f", most of all for rank {late}"
        way = "look at other programs on the machine, and at the number of cores for each process"
        if late is not None:
            way = f"look at the trace and the machine of rank {late}"
        changes: Changes = {}
        if axis == "dp" and not config.data.packing and profile.padding > MUCH_PADDING:
            changes, way = {"data.packing": True}, "give the ranks rows of equal length"
        yield Gain(seconds / profile.step_s, measured, changes, way)


def _recomputation(profile: Profile, config: RunConfig) -> Iterator[Gain]:
    if config.model.gradient_checkpointing == "none":
        return
    seconds = profile.mean["forward"]
    measured = f"backward computes every layer again, which takes no longer than forward: {_time(seconds)} per step"
    changes = {"model.gradient_checkpointing": "none"}
    yield Gain(seconds / profile.step_s, measured, changes, "keep activations, which takes more memory")


def _update(profile: Profile, config: RunConfig) -> Iterator[Gain]:
    seconds = profile.most("update")
    measured = f"clipping and the update take {_time(seconds)} per step"
    changes, way = _larger_batch(config), "update after more samples"
    if config.parallel.offload_optimizer:
        changes = {"parallel.offload_optimizer": False}
        way = "update on the device, which takes more of its memory"
    yield Gain(seconds / profile.step_s, measured, changes, way)


def _idle_device(profile: Profile, config: RunConfig) -> Iterator[Gain]:
    seconds = (1 - profile.busy) * (profile.mean["forward"] + profile.mean["backward"])
    measured = f"in {_percent(1 - profile.busy)} of forward and backward no operation ran, only Python (traced)"
    yield Gain(seconds / profile.step_s, measured, _larger_micro_batch(config), "give each operation more to do")


_ALL = (_padding, _data, _communication, _bubble, _stragglers, _recomputation, _update, _idle_device)


def _larger_batch(config: RunConfig) -> Changes:
    """Twice as many samples per update, by more micro-batches where the optimizer can take them."""
    train = config.train
    can: Any = config.registry.component("optimizer", config.optimizer.type).can
    if can.fuses_backward:
        return {"train.per_device_train_batch_size": 2 * (train.per_device_train_batch_size or 1)}
    changes = {}
    if train.global_batch_size is not None:
        changes["train.global_batch_size"] = 2 * train.global_batch_size
    if train.global_batch_size is None or train.gradient_accumulation_steps is not None:
        changes["train.gradient_accumulation_steps"] = 2 * (train.gradient_accumulation_steps or 1)
    return changes


def _larger_micro_batch(config: RunConfig) -> Changes:
    """Twice as many rows per forward, and where that is possible half as many forwards."""
    train = config.train
    changes = {"train.per_device_train_batch_size": 2 * (train.per_device_train_batch_size or 1)}
    steps = train.gradient_accumulation_steps or 1
    return changes if steps % 2 else changes | {"train.gradient_accumulation_steps": steps // 2}


def _work(rank: RankProfile) -> float:
    return sum(rank.parts[part] for part in ("forward", "backward", "update"))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _time(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"
