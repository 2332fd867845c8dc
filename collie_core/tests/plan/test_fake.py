"""What fake tensors answer, and the bends without which a step on them would be another step."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from collie_core.compat import fake_tensors_move, modules_convert_fake_tensors, transformers_without_values
from collie_core.plan.fake import GPU, QuickFakeTensors
from collie_core.plan.trace import MemoryTrace


def test_numbers_are_finite_and_nothing_overflows() -> None:
    with QuickFakeTensors():
        norm = torch.randn(8).norm()
        assert bool(norm.isfinite())
        assert not bool(torch.isfinite(norm).logical_not())
        assert not bool((~torch.isfinite(torch.randn(3))).any())
        assert float(norm) == 0.0


def test_counts_of_steps_are_true() -> None:
    with QuickFakeTensors():
        step = torch.zeros(())
        step += 1
        step.add_(1)
        assert step.item() == 2.0


def test_every_token_is_a_target() -> None:
    with QuickFakeTensors():
        rows, places = torch.ones(3, 5, dtype=torch.bool).nonzero(as_tuple=True)
        assert rows.shape == places.shape == (15,)


def test_modules_cannot_convert_fake_tensors_by_themselves() -> None:
    with FakeTensorMode():
        module = nn.Linear(2, 2)
        alias = module.weight.view(-1)
        with pytest.raises(RuntimeError, match="swap"):
            module.to(torch.bfloat16)
        with modules_convert_fake_tensors():
            module.to(torch.bfloat16)
        assert module.weight.dtype == torch.bfloat16
        assert alias.dtype == torch.float32


def test_transformers_would_mask_fake_tensors_in_another_way() -> None:
    from transformers import masking_utils

    positions = torch.arange(6)[None]
    assert masking_utils.find_packed_sequence_indices(positions) is None
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = torch.zeros(1, 6, dtype=torch.int64)
        assert masking_utils.find_packed_sequence_indices(fake) is not None
        with transformers_without_values(packing=False):
            assert masking_utils.find_packed_sequence_indices(fake) is None
        with transformers_without_values(packing=True):
            assert masking_utils.find_packed_sequence_indices(fake) is not None


def test_what_is_remembered_of_operations_is_what_they_give() -> None:
    def work() -> list[tuple[object, ...]]:
        found: list[torch.Tensor] = []
        for _ in range(2):  # the second time from memory
            weight = nn.Parameter(torch.zeros(6, 4))
            mixed = nn.functional.linear(torch.ones(3, 4), weight).view(2, 9).t()
            mixed.sum().backward()
            assert weight.grad is not None
            shares = weight.grad.view(-1).narrow(0, 8, 8).chunk(2)
            found += [mixed, weight.grad.add_(1), *shares, weight.to(torch.bfloat16), torch.sort(mixed)[1]]
            found += [torch.neg(shares[0], out=torch.empty_like(shares[0]))]
            weight.grad.resize_(2)
            found += [weight.grad]
        return [
            (one.shape, one.stride(), one.storage_offset(), one.dtype, one.untyped_storage().nbytes()) for one in found
        ]

    slow, quick = MemoryTrace(), MemoryTrace()
    with FakeTensorMode(), slow:
        given = work()
    with QuickFakeTensors(quick):
        assert work() == given
    assert quick.peaks() == slow.peaks()


def test_tensors_of_a_gpu_and_of_the_host_do_not_mix() -> None:
    with QuickFakeTensors(), fake_tensors_move():
        there, here = torch.ones(2, device=GPU), torch.ones(2)
        assert (there * 2.0).device == there.to(torch.bfloat16).view(1, 2).device == GPU
        assert (there + torch.zeros(())).device == GPU
        assert there.cpu().device == here.device
        assert torch.zeros((), device=GPU).flatten().device == GPU
        with pytest.raises(RuntimeError, match="two devices, cpu:0 and cpu"):
            there + here
        weight = nn.Parameter(here)
        weight.data = weight.data.to(GPU)
        (weight * there).sum().backward()
        assert weight.device == (weight + there).device == GPU
        assert weight.grad is not None
        assert weight.grad.device == GPU


def test_numbers_of_other_kinds_are_other_operations() -> None:
    with QuickFakeTensors():
        ones = torch.ones(2, dtype=torch.int64)
        assert [(ones * 1).dtype, (ones * 1.0).dtype, (ones * True).dtype] == [torch.int64, torch.float32, torch.int64]
