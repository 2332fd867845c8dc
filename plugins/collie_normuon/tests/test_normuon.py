"""NorMuon keeps what the kit demands of optimizers, follows its paper in float64, and normalises rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from collie_normuon.optimizer import COEFFICIENTS, NorMuon
from collie_testkit import checks


def reference(weights: Tensor, grads: Sequence[Tensor], **options: Any) -> Tensor:
    """Algorithm 1 for a matrix, AdamW for anything else."""
    if weights.ndim == 2:
        return normuon(weights, grads, **options)
    param = nn.Parameter(weights)
    betas, eps, decay = options["adamw_betas"], options["adamw_eps"], options["weight_decay"]
    optimizer = torch.optim.AdamW([param], lr=options["lr"], betas=betas, eps=eps, weight_decay=decay)
    return after(optimizer, param, grads)


def after(optimizer: torch.optim.Optimizer, param: nn.Parameter, grads: Sequence[Tensor]) -> Tensor:
    """The parameter after a step for each of the gradients."""
    for grad in grads:
        param.grad = grad
        optimizer.step()
    return param.detach()


def normuon(
    weights: Tensor,
    grads: Sequence[Tensor],
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    ns_steps: int,
    **_: Any,
) -> Tensor:
    """Line by line; the quintic acts on singular values, so here it is applied to them alone."""
    a, b, c = COEFFICIENTS
    momentum, squares = torch.zeros_like(weights), torch.zeros_like(weights[:, 0])
    for grad in grads:
        momentum = betas[0] * momentum + (1 - betas[0]) * grad
        left, values, right = torch.linalg.svd(momentum / momentum.norm(), full_matrices=False)
        for _step in range(ns_steps):
            values = a * values + b * values**3 + c * values**5
        orthogonal = (left * values) @ right
        squares = betas[1] * squares + (1 - betas[1]) * orthogonal.square().mean(1)
        update = orthogonal / (squares.sqrt() + eps)[:, None]
        rate = 0.2 * lr * math.sqrt(weights.numel()) / update.norm()
        weights = (1 - lr * weight_decay) * weights - rate * update
    return weights


test = checks("optimizer", "normuon", reference=reference)


def test_it_decays_as_its_equations() -> None:
    weights = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(4, 6)
    grads = torch.randn(5, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.8), "eps": 1e-3, "ns_steps": 3, "weight_decay": 0.3}
    param = nn.Parameter(weights.clone())
    optimizer = NorMuon([param], **options)
    expected = normuon(weights, list(grads), **options)
    torch.testing.assert_close(after(optimizer, param, list(grads)), expected, rtol=0, atol=1e-12)


def test_every_row_moves_as_far() -> None:
    param = nn.Parameter(torch.zeros(8, 3))
    param.grad = torch.randn(8, 3, generator=torch.Generator().manual_seed(2)) * torch.logspace(-1, 1, 8)[:, None]
    NorMuon([param], lr=1.0).step()
    torch.testing.assert_close(param.detach().square().mean(1).sqrt(), torch.full((8,), 0.2), rtol=1e-4, atol=0)


def test_vectors_without_a_role_are_refused() -> None:
    with pytest.raises(ValueError, match="for matrices; put vectors and other tensors into a group with role='other'"):
        NorMuon([nn.Parameter(torch.zeros(3))])
