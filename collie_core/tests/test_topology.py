"""Ranks on their axes: tensor fastest, then data, then pipeline."""

from __future__ import annotations

from typing import Any

import pytest

from collie_core.config.parallel import ParallelConfig
from collie_core.errors import RunError
from collie_core.topology import Axis, Topology, _axis_sizes

SIZES = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}


def axes() -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    topology = Topology.start(ParallelConfig(**SIZES))
    found: dict[str, Any] = {}
    for name in ("dp", "tp", "pp", "model"):
        axis: Axis = getattr(topology, name)
        total = torch.tensor(float(topology.rank))
        dist.all_reduce(total, group=axis.group)
        found[name] = (axis.size, axis.rank, axis.ranks, total.item())
    return found


def test_every_rank_stands_on_each_axis_once(zygote: Any) -> None:
    ranks = zygote.run(__file__, "axes", world_size=8)
    assert ranks[5] == {  # 5 = (pp 1 * 2 + dp 0) * 2 + tp 1
        "tp": (2, 1, (4, 5), 9.0),
        "dp": (2, 0, (5, 7), 12.0),
        "pp": (2, 1, (1, 5), 6.0),
        "model": (4, 3, (0, 1, 4, 5), 10.0),
    }
    for rank, found in enumerate(ranks):
        for size, own, members, total in found.values():
            assert len(members) == size
            assert members[own] == rank
            assert total == sum(members)


@pytest.mark.parametrize(
    ("sizes", "processes", "words"),
    [
        (SIZES, 6, "needs a multiple of 4 processes, but 6 were started; start the run with --nproc 4"),
        (SIZES, 1, "needs a multiple of 4 processes, but 1 were started; start the run with --nproc 4"),
        ({**SIZES, "data_parallel_size": 3}, 8, "needs 12 processes, but 8 were started; .* --nproc 12"),
    ],
)
def test_sizes_that_do_not_multiply_are_refused(sizes: dict[str, Any], processes: int, words: str) -> None:
    with pytest.raises(RunError, match=words):
        _axis_sizes(ParallelConfig(**sizes), processes)


def test_one_process_is_the_empty_topology() -> None:
    assert Topology.start(ParallelConfig()) == Topology()
