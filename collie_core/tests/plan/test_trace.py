"""The trace of memory: what it counts, and when."""

from __future__ import annotations

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from collie_core.plan.fake import GPU, QuickFakeTensors
from collie_core.plan.trace import MemoryTrace

KIB = 1024


def test_a_storage_counts_from_its_first_tensor_to_the_end_of_its_last() -> None:
    with MemoryTrace() as trace:
        first = torch.zeros(KIB // 4)
        view = first.view(2, -1)[0]
        del first
        second = torch.zeros(KIB // 4)  # 2 KiB now, since the view still holds the first
        del view
        third = torch.zeros(KIB // 4)
    assert trace.peaks()["setup"].total == 2 * KIB
    assert [len(second), len(third)] == [KIB // 4] * 2


def test_peaks_count_from_the_beginning_with_what_stood_before() -> None:
    with MemoryTrace() as trace:
        big = torch.zeros(8 * KIB // 4)
        kept = torch.zeros(KIB // 4)
        del big
        trace.begin()
        trace.phase = "forward"
        made = kept + 1
    assert trace.peaks()["forward"].total == 2 * KIB
    assert "setup" not in trace.peaks()
    assert made.sum() == KIB // 4


def test_what_is_not_on_the_device_is_in_host_memory() -> None:
    trace = MemoryTrace(512, GPU, rounds_pinned=True)
    with QuickFakeTensors(trace):
        trace.mark([torch.empty(100, device=GPU)], "weights")
        kept = torch.empty(3 * KIB, dtype=torch.uint8)
        kept = trace.pinned(kept)
    assert trace.peaks()["setup"].components["weights"] == 512
    assert trace.peaks("host")["setup"].total == 3 * KIB + 4 * KIB  # pinned memory is a power of two
    del kept


def test_sizes_are_rounded_up_to_the_granularity() -> None:
    with MemoryTrace(512) as trace:
        _ = torch.zeros(1)
    assert trace.peaks()["setup"].total == 512


def test_a_peak_is_told_by_component() -> None:
    model = nn.Linear(16, 8, bias=False)
    with MemoryTrace() as trace:
        trace.mark(model.parameters(), "weights")
        trace.vocabularies.add(8)
        trace.phase = "forward"
        inputs = torch.zeros(4, 16)
        hidden = inputs.relu()
        logits = model(hidden)
        trace.phase = "backward"
        logits.sum().backward()
        trace.mark([model.weight.grad], "gradients")
    components = trace.peaks()["backward"].components
    assert components["weights"] == components["gradients"] == 16 * 8 * 4
    assert components["activations"] == 2 * 4 * 16 * 4
    assert components["logits and loss"] >= 4 * 8 * 4


def test_fake_tensors_count_as_real_ones_do() -> None:
    def work() -> torch.Tensor:
        inputs = torch.zeros(32, 64, requires_grad=True)
        loss = nn.functional.softmax(inputs @ torch.zeros(64, 128), -1).square().logsumexp(-1).sum()
        loss.backward()
        assert inputs.grad is not None
        return inputs.grad

    with MemoryTrace() as real:
        work()
    with FakeTensorMode(), MemoryTrace() as fake:
        work()
    assert fake.peaks() == real.peaks()
    assert real.peaks()["setup"].total > 32 * 128 * 4


def test_nothing_is_counted_while_it_is_paused() -> None:
    with MemoryTrace() as trace:
        kept = torch.zeros(KIB // 4)
        with trace.paused():
            _ = kept + kept
        assert trace.peaks()["setup"].total == KIB
