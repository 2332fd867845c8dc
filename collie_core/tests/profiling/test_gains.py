"""What could be won: sizes, keys that are allowed, and how it reads."""

from __future__ import annotations

from typing import Any

import pytest

from collie_core.config.run import RunConfig
from collie_core.profiling.account import PARTS, Profile, RankProfile
from collie_core.profiling.gains import Gain, gains
from collie_core.profiling.show import as_object, profile_text, yaml_lines


def rank(number: int = 0, stage: int = 0, *, late: dict[str, float] | None = None, **seconds: float) -> RankProfile:
    """One whose communication and waiting are along the axis `dp`, or `pp` where it is a later stage's neighbour."""
    axis = "pp" if stage or seconds.pop("staged", 0) else "dp"
    parts = dict.fromkeys(PARTS, 0.0) | seconds
    axes = {part: {axis: parts[part]} for part in ("communication", "waiting")}
    return RankProfile(number, stage, parts, axes, late or {}, 0.0, 1.0, "")


def profile(*ranks: RankProfile, tokens: int = 100, packed: int = 100) -> Profile:
    return Profile((1.0,), ranks, tokens, 100, packed, 1)


def find(found: Profile, **sections: Any) -> list[Gain]:
    return gains(found, RunConfig(**sections), lambda changes: True)


def test_padding_is_worth_what_packing_takes_out_of_forward_and_backward() -> None:
    found = profile(rank(forward=0.3, backward=0.5, rest=0.2), tokens=60, packed=75)
    (padding,) = find(found)
    assert padding.share == pytest.approx(0.25 * 0.8)
    assert padding.measured.startswith("40 % of the tokens")
    assert padding.measured.endswith("packed 20 %")
    assert padding.changes == {"data.packing": True}
    assert find(found, data={"packing": True}) == []


@pytest.mark.parametrize(
    ("seconds", "sections", "changes"),
    [
        ({"data": 0.5}, {}, {"data.num_workers": 2}),
        ({"data": 0.5}, {"data": {"num_workers": 3}}, {"data.num_workers": 6}),
        ({"update": 0.5}, {}, {"train.gradient_accumulation_steps": 2}),
        ({"update": 0.5}, {"train": {"global_batch_size": 4}}, {"train.global_batch_size": 8}),
        ({"communication": 0.5}, {}, {"train.gradient_accumulation_steps": 2}),
        ({"communication": 0.5}, {"parallel": {"zero_stage": 3}}, {"parallel.zero_stage": 2}),
        (
            {"update": 0.5},
            {"parallel": {"zero_stage": 2, "offload_optimizer": True}},
            {"parallel.offload_optimizer": False},
        ),
        (
            {"forward": 0.5},
            {"model": {"gradient_checkpointing": "full"}},
            {"model.gradient_checkpointing": "none"},
        ),
    ],
)
def test_each_part_has_a_key(seconds: dict[str, float], sections: dict[str, Any], changes: dict[str, Any]) -> None:
    (gain,) = find(profile(rank(**{"rest": 0.5, **seconds})), **sections)
    assert gain.share == 0.5
    assert gain.changes == changes


def test_a_pipeline_is_filled_for_longer_or_cut_elsewhere() -> None:
    parallel = {"pipeline_parallel_size": 2}
    equal = profile(rank(0, staged=1, forward=0.5, waiting=0.5), rank(1, 1, forward=0.5, waiting=0.5))
    (gain,) = find(equal, parallel=parallel)
    assert (gain.share, gain.changes) == (0.5, {"train.gradient_accumulation_steps": 2})
    unequal = profile(rank(0, staged=1, forward=0.2, waiting=0.8), rank(1, 1, forward=0.9, waiting=0.1))
    (gain,) = find(unequal, parallel=parallel)
    assert (gain.share, gain.changes) == (pytest.approx(0.45), {"parallel.pipeline_cuts": "uniform"})
    assert "stage 1 works for 900.0 ms" in gain.measured


def test_a_late_rank_is_named_unless_all_are_late_in_turns() -> None:
    late = profile(rank(0, forward=0.5, waiting=0.5), rank(1, forward=1.0, late={"dp": 0.5}))
    (gain,) = find(late)
    assert "for rank 1" in gain.measured
    assert gain.changes == {}
    turns = profile(
        rank(0, forward=0.5, waiting=0.5, late={"dp": 0.4}), rank(1, forward=0.5, waiting=0.5, late={"dp": 0.5})
    )
    (gain,) = find(turns)
    assert "in turns" in gain.measured
    assert "cores" in gain.way


def test_ranks_with_unequal_rows_are_told_to_pack_them() -> None:
    """One line for both: the padding itself, and the ranks that wait for the one with the longest."""
    uneven = profile(rank(0, forward=0.5, waiting=0.5), rank(1, forward=1.0, late={"dp": 0.5}), tokens=80)
    (gain,) = find(uneven)
    assert gain.changes == {"data.packing": True}
    assert gain.share == pytest.approx(0.25)


def test_python_between_operations_asks_for_larger_ones() -> None:
    parts = dict.fromkeys(PARTS, 0.0) | {"forward": 1.0}
    idle = RankProfile(0, 0, parts, {"communication": {}, "waiting": {}}, {}, 0.0, 0.6, "")
    (gain,) = find(profile(idle), train={"per_device_train_batch_size": 4, "gradient_accumulation_steps": 6})
    assert gain.share == pytest.approx(0.4)
    assert gain.changes == {"train.per_device_train_batch_size": 8, "train.gradient_accumulation_steps": 3}


def test_what_is_refused_or_small_is_not_proposed() -> None:
    found = profile(rank(data=0.5, update=0.005, rest=0.495))
    assert [gain.changes for gain in find(found)] == [{"data.num_workers": 2}]
    assert gains(found, RunConfig(), lambda changes: False) == []


def test_it_reads_as_a_table_and_as_yaml() -> None:
    found = profile(rank(data=0.5, rest=0.5))
    text = profile_text(found, find(found))
    assert "rank 0        500.0" in text
    assert "1. up to 50 % of the step: a rank waits 500.0 ms per step for its samples" in text
    assert "     data: {num_workers: 2}" in text
    assert "nothing that could be changed" in profile_text(found, [])
    assert as_object(found, find(found))["gains"][0]["yaml"] == ["data: {num_workers: 2}"]
    changes = {"train.per_device_train_batch_size": 8, "train.gradient_accumulation_steps": 3}
    assert yaml_lines(changes) == ["train: {per_device_train_batch_size: 8, gradient_accumulation_steps: 3}"]
