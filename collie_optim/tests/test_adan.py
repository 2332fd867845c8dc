"""Adan against the paper and the authors' conventions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from elementwise_cases import assert_follows, gradients, problem, run, start
from torch import Tensor, nn

from collie_optim.adan import Adan

STATE = ["exp_avg", "exp_avg_diff", "exp_avg_sq"]
OPTIONS: list[dict[str, Any]] = [
    {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.98, 0.92, 0.99), "eps": 1e-8, "proximal": True},
    {"lr": 3e-3, "weight_decay": 0.3, "betas": (0.9, 0.8, 0.95), "eps": 1e-3, "proximal": False},
]


def authors(
    theta: Tensor,
    grads: Sequence[Tensor],
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float, float],
    eps: float,
    proximal: bool,
) -> tuple[Tensor, ...]:
    """The paper's equations with averages that start at 0 and are corrected; returns (theta, m, v, n)."""
    beta1, beta2, beta3 = betas
    m, v, n = torch.zeros_like(theta), torch.zeros_like(theta), torch.zeros_like(theta)
    previous = grads[0]
    for t, g in enumerate(grads, start=1):
        d = g - previous
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * d
        n = beta3 * n + (1 - beta3) * (g + beta2 * d) ** 2
        eta = lr / (torch.sqrt(n / (1 - beta3**t)) + eps)
        update = eta * (m / (1 - beta1**t) + beta2 * v / (1 - beta2**t))
        decay = lr * weight_decay
        theta = (theta - update) / (1 + decay) if proximal else theta - decay * theta - update
        previous = g
    return theta, m, v, n


def algorithm_1(
    theta: Tensor,
    grads: Sequence[Tensor],
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float, float],
    eps: float,
) -> tuple[Tensor, ...]:
    """Algorithm 1 of arXiv 2208.06677, line by line with its own betas; returns (theta, m, v, n)."""
    beta1, beta2, beta3 = (1 - beta for beta in betas)
    for k, g in enumerate(grads):
        if k == 0:
            m, v, n = g, torch.zeros_like(g), g**2
        else:
            d = g - grads[k - 1]
            m = (1 - beta1) * m + beta1 * g
            v = d if k == 1 else (1 - beta2) * v + beta2 * d
            n = (1 - beta3) * n + beta3 * (g + (1 - beta2) * d) ** 2
        eta = lr / (torch.sqrt(n) + eps)
        theta = (theta - eta * (m + (1 - beta2) * v)) / (1 + weight_decay * lr)
    return theta, m, v, n


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_follows_the_authors_conventions(dtype: torch.dtype) -> None:
    assert_follows(authors, Adan, OPTIONS, STATE, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_follows_algorithm_1(dtype: torch.dtype) -> None:
    options = [{name: value for name, value in group.items() if name != "proximal"} for group in OPTIONS]
    assert_follows(algorithm_1, partial(Adan, variant="paper"), options, STATE, dtype)


def test_paper_without_proximal_decays_first() -> None:
    param = nn.Parameter(torch.ones(1, dtype=torch.float64))
    param.grad = torch.full_like(param, 2.0)
    Adan([param], lr=0.1, weight_decay=0.5, variant="paper", proximal=False).step()
    assert param.item() == pytest.approx(0.95 - 0.1, abs=1e-8)  # m / sqrt(n) = 1


def restarted(theta: Tensor, grads: Sequence[Tensor], *, every: int, **options: Any) -> tuple[Tensor, ...]:
    """The authors' averages, new after every so many steps."""
    state: tuple[Tensor, ...] = ()
    for begin in range(0, len(grads), every):
        theta, *rest = authors(theta, grads[begin : begin + every], **options)
        state = tuple(rest)
    return theta, *state


@pytest.mark.parametrize("every", [1, 6, 13, 100])
def test_restart_steps_begin_anew(every: int) -> None:
    assert_follows(partial(restarted, every=every), partial(Adan, restart_steps=every), OPTIONS, STATE, torch.float64)


def test_restart_begins_anew_when_called() -> None:
    params, grads = problem(torch.float64, steps=21)
    by_hand, others = problem(torch.float64, steps=21)
    grads[1] = others[1] = gradients((5,), 21, 99)  # all without None, so that counts agree
    grads[3] = others[3] = gradients((2, 3, 4), 21, 98)
    automatic = Adan(params, restart_steps=7)
    run(automatic, params, grads)
    optimizer = Adan(by_hand)
    for begin in (0, 7, 14):
        optimizer.restart()
        run(optimizer, by_hand, [sequence[begin : begin + 7] for sequence in others])
    for one, other in zip(params, by_hand, strict=True):
        assert torch.equal(one, other)
    straight, _ = problem(torch.float64)
    run(Adan(straight), straight, grads)
    assert not torch.equal(straight[0], params[0])


def test_state_is_declared() -> None:
    from collie_optim import ADAN

    param = nn.Parameter(start((100,), 0).float())
    param.grad = torch.ones(100)
    optimizer = Adan([param])
    optimizer.step()
    held = sum(tensor.nbytes for tensor in optimizer.state[param].values() if tensor.shape == param.shape)
    assert held == 100 * ADAN.can.state_bytes_per_parameter
    assert torch.equal(optimizer.state[param]["previous_grad"], torch.ones(100))
