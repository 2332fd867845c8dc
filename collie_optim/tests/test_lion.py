"""Lion against the paper. What it shares with the others is in test_elementwise.py and test_kernels.py."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from elementwise_cases import assert_follows
from torch import Tensor, nn

from collie_optim.lion import Lion


def algorithm_2(
    theta: Tensor, grads: Sequence[Tensor], *, lr: float, weight_decay: float, betas: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Algorithm 2 of arXiv 2302.06675, line by line; returns (theta, m)."""
    beta1, beta2 = betas
    m = torch.zeros_like(theta)
    for g in grads:
        c = beta1 * m + (1 - beta1) * g
        theta = theta - lr * (torch.sign(c) + weight_decay * theta)
        m = beta2 * m + (1 - beta2) * g
    return theta, m


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_follows_algorithm_2_for_all_shapes_and_groups(dtype: torch.dtype) -> None:
    options = [
        {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.99)},
        {"lr": 3e-3, "weight_decay": 0.0, "betas": (0.95, 0.98)},
    ]
    assert_follows(algorithm_2, Lion, options, ["exp_avg"], dtype)


def test_every_weight_moves_by_exactly_lr() -> None:
    param = nn.Parameter(torch.zeros(100))
    param.grad = torch.logspace(-6, 6, 100)
    Lion([param], lr=0.25).step()
    assert torch.equal(param.detach(), torch.full((100,), -0.25))


def test_keeps_one_tensor_per_parameter() -> None:
    param = nn.Parameter(torch.zeros(3))
    param.grad = torch.ones(3)
    optimizer = Lion([param])
    optimizer.step()
    assert list(optimizer.state[param]) == ["exp_avg"]
