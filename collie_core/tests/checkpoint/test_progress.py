"""Schedules go on where they were, those of the core and those that were handed in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR, StepLR

from collie_core.checkpoint.files import CheckpointError
from collie_core.checkpoint.progress import restore_schedule, schedule_state

SOURCE = Path("step-00000003")
MADE: list[Callable[[SGD], LRScheduler]] = [
    lambda optimizer: LambdaLR(optimizer, lambda step: 0.9**step),
    lambda optimizer: StepLR(optimizer, 2, gamma=0.3),
    lambda optimizer: OneCycleLR(optimizer, 0.5, total_steps=10),
]


def made(make: Callable[[SGD], LRScheduler]) -> tuple[SGD, LRScheduler]:
    optimizer = SGD([{"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr} for lr in (0.1, 0.2)], momentum=0.9)
    return optimizer, make(optimizer)


def rates(optimizer: SGD, scheduler: LRScheduler, steps: int) -> list[Any]:
    found = []
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        found.append([(group["lr"], group["momentum"]) for group in optimizer.param_groups])
    return found


@pytest.mark.parametrize("make", MADE)
def test_it_goes_on(make: Callable[[SGD], LRScheduler]) -> None:
    once = rates(*made(make), 6)
    first, again = made(make), made(make)
    rates(*first, 3)
    restore_schedule(again[1], schedule_state(first[1]), SOURCE)
    assert [group["lr"] for group in again[0].param_groups] == [lr for lr, _ in once[2]]
    assert rates(*again, 3) == once[3:]


def test_another_kind_is_refused() -> None:
    with pytest.raises(CheckpointError, match="a schedule StepLR, and it is LambdaLR here"):
        restore_schedule(made(MADE[0])[1], schedule_state(made(MADE[1])[1]), SOURCE)
