"""AdamW and SGD of the core: torch's own, with the fused kernels where torch has them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from collie_core.config.base import OptimizerConfig
from collie_core.optimizers.adamw import adamw, fused_kernel_fits
from collie_core.optimizers.configs import AdamWConfig, SGDConfig
from collie_core.optimizers.sgd import sgd


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": [model.weight], "weight_decay": 0.1}, {"params": [model.bias], "weight_decay": 0.0}]


def _options(config: OptimizerConfig) -> dict[str, Any]:
    return config.model_dump(exclude=set(config.for_the_core))


@pytest.mark.parametrize(
    ("build", "reference", "options"),
    [
        (adamw, torch.optim.AdamW, _options(AdamWConfig(lr=0.01, betas=(0.8, 0.9)))),
        (sgd, torch.optim.SGD, _options(SGDConfig(lr=0.01))),
        (sgd, torch.optim.SGD, _options(SGDConfig(lr=0.01, momentum=0.9, nesterov=True))),
    ],
    ids=["adamw", "sgd", "momentum"],
)
def test_the_updates_are_those_of_torch(build: Any, reference: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Linear(7, 5)
    other = copy.deepcopy(model)
    ours = build(_groups(model), **options)
    theirs = reference(_groups(other), foreach=False, **options)
    assert ours.defaults["fused"] == (not options.get("momentum"))  # there torch's kernel fails
    x = torch.randn(3, 7)  # [B, D]
    for _ in range(20):
        for net, optimizer in ((model, ours), (other, theirs)):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=1e-5, atol=1e-6)


def test_where_torch_has_no_fused_kernel() -> None:
    assert not fused_kernel_fits([{"params": [nn.Parameter(torch.zeros(2, dtype=torch.complex64))]}])
    assert not fused_kernel_fits([{"params": [nn.Parameter(torch.zeros(2, device="meta"))]}])
    meta = [nn.Parameter(torch.zeros(2, device="meta"))]
    assert not adamw([{"params": meta}], lr=0.1).defaults["fused"]
