"""Exchanges with other ranks: their names, and that torch is as before once nobody watches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from collie_core.compat import collectives_watched
from collie_core.profiling.calls import Calls
from collie_core.profiling.clock import Clock
from collie_core.topology import Axis, Topology


class Group:
    """Of two ranks, this one the second."""

    group_name = "world"

    def rank(self) -> int:
        return 1


@pytest.fixture
def clock() -> Clock:
    clock = Clock(torch.device("cpu"))
    clock.start()
    return clock


@pytest.fixture
def calls(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Calls:
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: [0, 1])
    return Calls(clock, Topology(dp=Axis(2, 1, None, (0, 1)), world_size=2, rank=1))


def nothing(*args: Any) -> None:
    """Stands for torch's functions."""


def test_names_are_the_same_at_both_ends(calls: Calls, clock: Clock) -> None:
    for method, args in (("allreduce", ()), ("send", ([], 0, 7)), ("recv", ([], 0, 7)), ("allreduce", ())):
        calls._call(method, nothing, Group(), *args)
    names = [(names, axis) for _, names, axis in clock.stop().calls]
    assert names == [
        (("world#1",), "dp"),
        (("world:1>0:7#1",), "dp"),
        (("world:0>1:7#1",), "dp"),
        (("world#2",), "dp"),
    ]


def test_calls_that_are_sent_off_together_are_one(calls: Calls, clock: Clock) -> None:
    """As nccl does it with what goes both ways between two stages."""
    calls._topology = Topology(pp=Axis(2, 1, None, (0, 1)), world_size=2, rank=1)
    calls._call("_start_coalescing", nothing, Group(), "cuda")
    calls._call("send", nothing, Group(), [], 0, 0)
    calls._call("recv", nothing, Group(), [], 0, 0)
    calls._call("_end_coalescing", nothing, Group(), "cuda")
    timeline = clock.stop()
    assert [(names, axis) for _, names, axis in timeline.calls] == [(("world:1>0:0#1", "world:0>1:0#1"), "pp")]
    assert [phase for _, phase, call in timeline.marks if call == 0] == ["communication"]


def test_torch_is_as_before_outside() -> None:
    before = dict(vars(dist.ProcessGroup)), vars(dist.Work)["wait"]
    with collectives_watched(nothing, nothing):
        assert dist.ProcessGroup.allreduce(SimpleNamespace()) is None  # type: ignore[call-overload]
    assert (dict(vars(dist.ProcessGroup)), vars(dist.Work)["wait"]) == before


def test_a_changed_target_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "ProcessGroup", SimpleNamespace)
    with pytest.raises(RuntimeError, match="compat needs an update"), collectives_watched(nothing, nothing):
        pass
