"""The loss scale of float16 goes from one engine to another."""

from __future__ import annotations

from typing import Any

import torch
from steps import make_model
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from collie_core.engine.fused_step import FusedStep
from collie_core.engine.step import TorchStep
from collie_core.topology import Topology


def make(kind: type[Any], dtype: torch.dtype) -> Any:
    model = make_model()
    optimizer = SGD(model.parameters())
    scheduler = LambdaLR(optimizer, lambda step: 1.0)
    return kind(model, optimizer, scheduler, topology=Topology(), dtype=dtype, max_grad_norm=None)


def test_it_goes_on() -> None:
    fused = make(FusedStep, torch.float16)
    fused.scale.update(overflow=True)
    fused.scale.update(overflow=False)
    found = fused.loss_scale()
    assert found == {"scale": 2.0**15, "good_steps": 1}
    plain = make(TorchStep, torch.float16)
    plain.set_loss_scale(found)
    assert plain.loss_scale() == found
    again = make(FusedStep, torch.float16)
    again.set_loss_scale(plain.loss_scale())
    assert (again.scale.value, again.scale.good_steps) == (2.0**15, 1)


def test_other_precisions_have_none() -> None:
    for kind in (TorchStep, FusedStep):
        step = make(kind, torch.bfloat16)
        assert step.loss_scale() == {}
        step.set_loss_scale({"scale": 8.0, "good_steps": 3})
        assert step.loss_scale() == {}
