"""LOMO and AdaLomo against the equations of their papers in float64, and their promises as torch optimizers."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from elementwise_cases import assert_follows, in_groups, problem, run, start, through_a_file
from torch import Tensor, nn

from collie_core.api import FusedOptimizer
from collie_optim.adalomo import BLOCK, AdaLomo
from collie_optim.lomo import Lomo

DTYPES = [torch.float64, torch.float32]


def lomo_algorithm_1(
    theta: Tensor,
    grads: Sequence[Tensor],
    *,
    lr: float = 1e-2,
    weight_decay: float = 0.0,
    clip_grad_value: float | None = None,
) -> tuple[Tensor, ...]:
    """arXiv 2306.09782, Algorithm 1, line 11, with the decoupled decay of the authors' code."""
    for g in grads:
        clipped = g if clip_grad_value is None else g.clamp(-clip_grad_value, clip_grad_value)
        theta = theta * (1 - lr * weight_decay) - lr * clipped
    return (theta,)


def adalomo_algorithm_1(
    theta: Tensor,
    grads: Sequence[Tensor],
    *,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    decay_rate: float = -0.8,
    beta: float | None = None,
    eps: tuple[float, float] = (1e-30, 1e-3),
    clip_threshold: float = 1.0,
) -> tuple[Tensor, ...]:
    """arXiv 2310.10195, Algorithm 1, with the root and the decay of the authors' code; V is written out in full."""
    matrix = theta.ndim >= 2
    r = torch.zeros(theta.shape[:-1], dtype=theta.dtype) if matrix else None
    c = torch.zeros(*theta.shape[:-2], theta.shape[-1], dtype=theta.dtype) if matrix else None
    v = torch.zeros_like(theta)
    for t, g in enumerate(grads, start=1):
        b = 1 - t**decay_rate if beta is None else beta
        square = g**2 + eps[0]
        if r is None or c is None:
            v = b * v + (1 - b) * square
        else:
            r = b * r + (1 - b) * square.sum(-1) / g.shape[-1]
            c = b * c + (1 - b) * square.sum(-2) / g.shape[-2]
            v = r[..., :, None] * c[..., None, :] / r.mean(-1)[..., None, None]
        u = g / v.sqrt()
        u = u / max(1.0, _rms(u) / clip_threshold)
        step = lr * max(eps[1], _rms(theta))
        theta = theta * (1 - step * weight_decay) - step * u
    return (theta, v) if r is None or c is None else (theta, r, c)


def _rms(tensor: Tensor) -> float:
    return math.sqrt(float((tensor**2).mean()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_lomo_follows_its_paper(dtype: torch.dtype) -> None:
    options = [{"lr": 1e-3, "weight_decay": 0.1}, {"lr": 1e-2, "clip_grad_value": 0.5}]
    assert_follows(lomo_algorithm_1, Lomo, options, [], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", [None, 0.9])
def test_adalomo_follows_its_paper(beta: float | None, dtype: torch.dtype) -> None:
    options = [
        {"lr": 5e-3, "weight_decay": 0.1, "beta": beta},
        {"lr": 1e-2, "clip_threshold": 0.5, "beta": beta, "decay_rate": -0.5},
    ]
    params, grads = problem(dtype)
    optimizer = AdaLomo(in_groups(params, options))
    expected = [
        adalomo_algorithm_1(
            param.detach().double().clone(), [g.double() for g in sequence if g is not None], **options[number % 2]
        )
        for number, (param, sequence) in enumerate(zip(params, grads, strict=True))
    ]
    run(optimizer, params, grads)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-6
    for param, (theta, *state) in zip(params, expected, strict=True):
        torch.testing.assert_close(param.detach().double(), theta, rtol=0, atol=tolerance)
        names = ["row", "col"] if param.ndim >= 2 else ["square"]
        for name, wanted in zip(names, state, strict=True):
            found = optimizer.state[param][name].double()
            torch.testing.assert_close(found, wanted, rtol=0 if dtype == torch.float64 else 1e-5, atol=tolerance)


def test_a_matrix_of_many_blocks_is_updated_as_one() -> None:
    shape = (BLOCK // 1000 + 7, 1500)  # two blocks, the second not full
    param = nn.Parameter(start(shape, 0))
    grads = [torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in range(3)]
    expected, *_ = adalomo_algorithm_1(param.detach().clone(), grads, weight_decay=0.1)
    run(AdaLomo([param], weight_decay=0.1), [param], [grads])
    torch.testing.assert_close(param.detach(), expected, rtol=0, atol=1e-10)


def test_adalomo_with_zero_gradients_stays_finite_and_where_it_is() -> None:
    param = nn.Parameter(start((3, 4), 0).float())
    before = param.detach().clone()
    run(AdaLomo([param]), [param], [[torch.zeros(3, 4)] * 3])
    assert torch.equal(param.detach(), before)


@pytest.mark.parametrize("make", [Lomo, AdaLomo])
def test_below_float32_it_calculates_in_float32_and_rounds_once(make: Any) -> None:
    for shape in [(6, 5), (7,)]:
        coarse = nn.Parameter(start(shape, 3).bfloat16())
        fine = nn.Parameter(coarse.detach().float())
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(2)).bfloat16()
        run(make([coarse], lr=0.1), [coarse], [[grad]])
        run(make([fine], lr=0.1), [fine], [[grad.float()]])
        assert torch.equal(coarse.detach(), fine.detach().bfloat16())


@pytest.mark.parametrize("make", [Lomo, AdaLomo])
def test_one_update_in_backward_is_one_step_after_it(make: Any) -> None:
    first, second = (nn.Linear(4, 3) for _ in range(2))
    second.load_state_dict(first.state_dict())
    x = torch.randn(5, 4)
    fused, plain = make(first.parameters(), lr=0.1), make(second.parameters(), lr=0.1)
    assert isinstance(fused, FusedOptimizer)

    def in_backward(param: nn.Parameter) -> None:
        assert param.grad is not None
        grad, param.grad = param.grad, None
        fused.update(param, grad)

    for param in first.parameters():
        param.register_post_accumulate_grad_hook(in_backward)
    for _ in range(3):
        first(x).square().mean().backward()
        fused.step()  # finds no gradient
        second(x).square().mean().backward()
        plain.step()
        plain.zero_grad()
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("make", [Lomo, AdaLomo])
def test_resumed_run_is_bit_identical(make: Any) -> None:
    def fresh() -> tuple[list[nn.Parameter], Any]:
        params, _ = problem(torch.float32)
        return params, make(in_groups(params, [{"lr": 2e-3}, {"weight_decay": 0.3}]), lr=1e-3)

    _, grads = problem(torch.float32)
    straight, optimizer = fresh()
    run(optimizer, straight, grads)
    first, before = fresh()
    run(before, first, [sequence[:15] for sequence in grads])
    second, after = fresh()
    for param, saved in zip(second, first, strict=True):
        param.data.copy_(saved.data)
    after.load_state_dict(through_a_file(copy.deepcopy(before.state_dict())))
    run(after, second, [sequence[15:] for sequence in grads])
    for one, other in zip(straight, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("make", [Lomo, AdaLomo])
def test_converges_on_a_quadratic(make: Any) -> None:
    param = nn.Parameter(torch.full((8, 3), 5.0))
    optimizer = make([param], lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        param.square().sum().backward()
        optimizer.step()
    assert param.detach().abs().max() < 0.05


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (Lomo, {"lr": -1.0}, "lr=-1.0"),
        (Lomo, {"weight_decay": -0.1}, "weight_decay=-0.1"),
        (Lomo, {"clip_grad_value": -0.1}, "clip_grad_value=-0.1"),
        (AdaLomo, {"decay_rate": 0.8}, "decay_rate=0.8"),
        (AdaLomo, {"beta": 1.0}, "beta=1.0"),
        (AdaLomo, {"clip_threshold": 0.0}, "clip_threshold=0.0"),
        (AdaLomo, {"eps": (-1.0, 1e-3)}, "eps=-1.0"),
    ],
)
def test_options_out_of_range_are_refused(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make([nn.Parameter(torch.zeros(1))], **options)


@pytest.mark.parametrize("make", [Lomo, AdaLomo])
def test_sparse_gradients_are_refused(make: Any) -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="dense"):
        make(embedding.parameters()).step()
