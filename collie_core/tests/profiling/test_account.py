"""From moments to seconds: what is waited for, who is late, and that nothing is lost."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from collie_core.data.loader import Batch, StepBatch
from collie_core.profiling.account import PARTS, account
from collie_core.profiling.clock import NO_CALL, Clock, Timeline
from collie_core.profiling.kernels import busy_share, overlap
from collie_core.profiling.record import Recording, packed_tokens


def recording(rank: int, timeline: Timeline) -> Recording:
    return Recording(rank, 0, timeline, 30, 40, 35, 1)


def test_a_late_rank_is_told_from_a_slow_network() -> None:
    """Rank 0 begins an exchange at 2 and rank 1 at 5; it takes until 6, and then there is an update until 10."""
    early = Timeline(
        [(0.0, "forward", NO_CALL), (2.0, "communication", 0), (6.0, "update", NO_CALL), (10.0, "rest", NO_CALL)],
        [(2.0, ("world#1",), "dp")],
        [0.0, 10.0],
        10.0,
    )
    late = Timeline(
        [(0.0, "forward", NO_CALL), (5.0, "communication", 0), (6.0, "update", NO_CALL), (10.0, "rest", NO_CALL)],
        [(5.0, ("world#1",), "dp")],
        [0.0, 10.0],
        10.0,
    )
    profile = account([recording(0, early), recording(1, late)], 1)
    first, second = profile.ranks
    assert first.parts == dict.fromkeys(PARTS, 0.0) | {
        "forward": 2.0,
        "waiting": 3.0,
        "communication": 1.0,
        "update": 4.0,
    }
    assert second.parts == dict.fromkeys(PARTS, 0.0) | {"forward": 5.0, "communication": 1.0, "update": 4.0}
    assert (first.late_s, second.late_s) == ({}, {"dp": 3.0})
    assert (profile.along("waiting", "dp"), profile.along("communication", "dp")) == (1.5, 1.0)
    assert profile.held_up_by("dp") == 1
    assert (profile.step_s, profile.error) == (10.0, 0.0)
    assert (profile.tokens, profile.computed_tokens, profile.packed_tokens, profile.padding) == (60, 80, 70, 0.25)


def test_ranks_that_share_layers_read_the_same_tokens() -> None:
    timeline = Timeline([(0.0, "rest", NO_CALL), (1.0, "rest", NO_CALL)], [], [0.0, 1.0], 1.0)
    assert account([recording(rank, timeline) for rank in range(4)], 2).tokens == 60


def test_what_lies_before_the_first_step_and_after_the_last_does_not_count() -> None:
    marks = [(0.0, "data", NO_CALL), (3.0, "rest", NO_CALL), (9.0, "rest", NO_CALL)]
    profile = account([recording(0, Timeline(marks, [], [2.0, 4.0, 6.0], 5.0))], 1)  # type: ignore[arg-type]
    assert profile.ranks[0].parts["data"] == 0.5
    assert profile.ranks[0].parts["rest"] == 1.5
    assert profile.steps == (2.0, 2.0)
    assert profile.error == pytest.approx(0.2)  # a clock that runs differently is told


def test_the_innermost_phase_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(100))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(now)))
    clock = Clock(torch.device("cpu"))
    with clock.phase("forward"):
        pass  # before the start nothing is kept, and the time is not even asked
    clock.start()
    with clock.phase("backward"), clock.phase("communication"):
        pass
    with pytest.raises(ValueError, match="left"), clock.phase("update"):
        raise ValueError("left")
    timeline = clock.stop()
    phases = [phase for _, phase, _ in timeline.marks]
    assert phases == ["rest", "backward", "communication", "backward", "rest", "update", "rest", "rest"]
    assert timeline.shifted(10).marks[0][0] == timeline.marks[0][0] + 10


def test_packed_tokens_are_those_of_the_loader() -> None:
    """Rows of at most 10 tokens, two at a time: 9 and 6+4, then 5+4."""
    samples = {length: ((0, length),) for length in (4, 5, 6, 9)}
    first, second = (
        Batch(None, None, layout=layout) for layout in ((samples[4], samples[9]), (samples[5], samples[6]))
    )  # type: ignore[arg-type]
    third = Batch(None, None, layout=(samples[4], ((0, 0),)))  # type: ignore[arg-type]
    batch = StepBatch([first, second, third], samples=5, tokens=28, epoch=0.0)
    assert packed_tokens(batch, rows_per_micro_batch=2, max_length=10) == 2 * 10 + 1 * 9


def test_moments_of_a_gpu_are_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream falls behind the host: what counts is when it comes to an event."""
    host = SimpleNamespace(s=100.0, stream_behind=0.0)

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            assert stream == "computing"
            self.when = host.s + host.stream_behind

        def elapsed_time(self, end: Event) -> float:
            return float(1000 * (end.when - self.when))

    def synchronize(device: torch.device) -> None:
        host.s, host.stream_behind = host.s + host.stream_behind, 0.0

    monkeypatch.setattr("time.perf_counter", lambda: host.s)
    monkeypatch.setattr("torch.cuda.Event", Event)
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: "computing")
    monkeypatch.setattr("torch.cuda.synchronize", synchronize)
    clock = Clock(torch.device("cuda", 0))
    clock.start()
    host.s, host.stream_behind = 101.0, 5.0
    with clock.phase("forward"):
        host.s = 102.0
        assert clock.call(("world#1",), "dp") == 0
    host.s = 103.0
    clock.step_ends()
    timeline = clock.stop()
    moments = [(when, phase) for when, phase, _ in timeline.marks]
    assert moments == [(100.0, "rest"), (106.0, "forward"), (107.0, "rest"), (108.0, "rest")]
    assert (timeline.calls[0][0], timeline.steps, timeline.wall_s) == (107.0, [100.0, 108.0], 8.0)


def test_the_share_in_which_a_device_computes() -> None:
    def event(name: str, begin: float, end: float, device: Any = DeviceType.CPU) -> Any:
        return SimpleNamespace(name=name, device_type=device, time_range=SimpleNamespace(start=begin, end=end))

    on_cpu = [
        event("collie: forward", 0, 10),
        event("collie: communication", 6, 8),
        event("aten::mm", 1, 5),
        event("aten::mm", 20, 30),
    ]
    assert busy_share(SimpleNamespace(events=lambda: on_cpu)) == 0.5
    cuda = DeviceType.CUDA
    on_gpu = [*on_cpu, event("gemm", 10, 14, cuda), event("ncclKernel", 14, 16, cuda), event("gemm", 18, 20, cuda)]
    assert busy_share(SimpleNamespace(events=lambda: on_gpu)) == 0.75
    assert busy_share(SimpleNamespace(events=list)) == 1.0


def test_spans_overlap() -> None:
    assert overlap([(0, 2), (1, 4), (6, 7)], [(3, 10)]) == 2
    assert overlap([], [(0, 1)]) == 0
