"""Sophia-G against the paper: its step, its estimates, and when they are due."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from elementwise_cases import in_groups, problem, through_a_file
from torch import Tensor, nn

from collie_core.api import CurvatureOptimizer
from collie_optim.sophia import Sophia

TOKENS = 32
OPTIONS: list[dict[str, Any]] = [
    {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.96, 0.99), "rho": 0.05, "eps": 1e-12},
    {"lr": 3e-3, "weight_decay": 0.0, "betas": (0.9, 0.8), "rho": 2.0, "eps": 1e-3},
]


def algorithm_3(
    theta: Tensor,
    grads: Sequence[tuple[Tensor | None, Tensor | None]],
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    rho: float,
    eps: float,
) -> tuple[Tensor, ...]:
    """Algorithm 3 of arXiv 2305.14342, line by line; returns (theta, m, h).

    `grads` are pairs: of the true labels, and of drawn labels at the steps that have an estimate.
    """
    beta1, beta2 = betas
    m, h = torch.zeros_like(theta), torch.zeros_like(theta)
    for g, drawn in grads:
        if drawn is not None:
            h = beta2 * h + (1 - beta2) * TOKENS * drawn * drawn  # Algorithm 2: B g * g
        if g is not None:
            m = beta1 * m + (1 - beta1) * g
            theta = theta - lr * weight_decay * theta
            theta = theta - lr * torch.clamp(m / torch.maximum(rho * h, torch.tensor(eps)), -1, 1)
    return theta, m, h


def drive(
    optimizer: Any,
    params: Sequence[Tensor],
    grads: Sequence[Sequence[Tensor | None]],
    drawn: Sequence[Sequence[Tensor | None]],
    tokens: int = TOKENS,
) -> list[bool]:
    """Steps as the engine takes them: an estimate first where one is due. Returns where one was."""
    due = []
    for step in range(len(grads[0])):
        due.append(optimizer.curvature_due())
        if due[-1]:
            set_gradients(params, [sequence[step] for sequence in drawn])
            with optimizer.estimating(tokens):
                optimizer.step()
        set_gradients(params, [sequence[step] for sequence in grads])
        optimizer.step()
    return due


def set_gradients(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = None if grad is None else grad.to(param.dtype, copy=True)


def small(grads: Sequence[Sequence[Tensor | None]]) -> list[list[Tensor | None]]:
    """Gradients of drawn labels: other numbers than those of true ones, of a size that leaves some steps unclipped."""
    return [[None if grad is None else 0.3 * grad.flip(-1) if grad.dim() else 0.3 * grad for grad in s] for s in grads]


@pytest.mark.parametrize("interval", [1, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_follows_algorithm_3_for_all_shapes_and_groups(dtype: torch.dtype, tolerance: float, interval: int) -> None:
    params, grads = problem(dtype)
    drawn = small(grads)
    expected = []
    for number, param in enumerate(params):
        pairs = [
            (None if g is None else g.double(), None if d is None or step % interval else d.double())
            for step, (g, d) in enumerate(zip(grads[number], drawn[number], strict=True))
        ]
        expected.append(algorithm_3(param.detach().double().clone(), pairs, **OPTIONS[number % 2]))
    optimizer = Sophia(in_groups(params, OPTIONS), hessian_interval=interval)
    drive(optimizer, params, grads, drawn)
    for param, (theta, m, h) in zip(params, expected, strict=True):
        state = optimizer.state[param]
        torch.testing.assert_close(param.detach().double(), theta, rtol=0, atol=tolerance)
        torch.testing.assert_close(state["exp_avg"].double(), m, rtol=0, atol=tolerance)
        torch.testing.assert_close(state["hessian"].double(), h, rtol=0, atol=10 * tolerance)  # numbers of about 10


def test_keeps_the_contract() -> None:
    assert isinstance(Sophia([torch.zeros(1)]), CurvatureOptimizer)


# -- when an estimate is due --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interval", "due"), [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [1, 4, 7]), (10, [1])], ids=["k=1", "k=3", "k=10"]
)
def test_estimates_are_due_at_steps_1_and_1_plus_k(interval: int, due: list[int]) -> None:
    params, grads = problem(torch.float32, steps=7)
    flags = drive(Sophia(params, hessian_interval=interval), params, grads, grads)
    assert [step for step, flag in enumerate(flags, start=1) if flag] == due


def test_due_steps_survive_a_checkpoint() -> None:
    params, grads = problem(torch.float32, steps=10)
    before, after = Sophia(params, hessian_interval=3), Sophia(params, hessian_interval=3)
    first = drive(before, params, [s[:5] for s in grads], [s[:5] for s in grads])
    after.load_state_dict(through_a_file(before.state_dict()))
    second = drive(after, params, [s[5:] for s in grads], [s[5:] for s in grads])
    assert [step for step, flag in enumerate(first + second, start=1) if flag] == [1, 4, 7, 10]


def test_ranks_agree_whatever_they_hold() -> None:
    """One rank has no parameter in one group, another none at all, a third one without gradients now and then."""
    full, half = ([nn.Parameter(torch.ones(2)) for _ in range(2)] for _ in range(2))
    ranks = [
        Sophia([{"params": full[:1]}, {"params": full[1:]}], hessian_interval=3),
        Sophia([{"params": []}, {"params": half[1:]}], hessian_interval=3),
        Sophia([{"params": []}, {"params": []}], hessian_interval=3),
    ]
    due = []
    for step in range(7):
        due.append({rank.curvature_due() for rank in ranks})
        full[0].grad = torch.ones(2) if step % 2 else None
        full[1].grad = half[1].grad = torch.ones(2)
        for rank in ranks:
            rank.step()
    assert due == [{True}, {False}, {False}, {True}, {False}, {False}, {True}]


def test_parts_of_a_group_that_step_one_after_another_are_one_step() -> None:
    """ZeRO-3 puts the parts of a group into it in turn, calls `step` for each, and leaves the group empty."""
    parts = [nn.Parameter(torch.ones(2)) for _ in range(4)]
    optimizer = Sophia([{"params": list(parts)}, {"params": []}], hessian_interval=2)
    group = optimizer.param_groups[0]
    due = []
    for _ in range(5):
        group["params"] = []
        due.append(optimizer.curvature_due())
        for part in parts:
            part.grad = torch.ones(2)
            group["params"] = [part]
            optimizer.step()
    assert due == [True, False, True, False, True]


def test_groups_that_step_one_after_another_are_one_step() -> None:
    """ZeRO-1 and ZeRO-2 show the optimizer one group at a time."""
    params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = Sophia([{"params": [param]} for param in params], hessian_interval=2)
    groups, due = optimizer.param_groups, []
    for _ in range(5):
        due.append(optimizer.curvature_due())
        for group in groups:
            group["params"][0].grad = torch.ones(2)
            optimizer.param_groups = [group]
            optimizer.step()
        optimizer.param_groups = groups
    assert due == [True, False, True, False, True]


# -- what an estimate does ----------------------------------------------------------------------------------


def one_weight(**options: Any) -> tuple[nn.Parameter, Any]:
    param = nn.Parameter(torch.ones(1, dtype=torch.float64))
    return param, Sophia([param], lr=0.1, weight_decay=0.0, **options)


def estimate(optimizer: Any, param: Tensor, grad: float, tokens: int) -> None:
    param.grad = torch.full_like(param, grad)
    with optimizer.estimating(tokens):
        optimizer.step()


def test_an_estimate_changes_nothing_but_the_curvature() -> None:
    param, optimizer = one_weight()
    param.grad = torch.ones_like(param)
    optimizer.step()
    weight, momentum = param.item(), optimizer.state[param]["exp_avg"].item()
    estimate(optimizer, param, 5.0, 10)
    state = optimizer.state[param]
    assert (param.item(), state["exp_avg"].item(), state["step"].item()) == (weight, momentum, 1)
    assert optimizer.param_groups[0]["steps"] == 1
    assert state["hessian"].item() == pytest.approx(0.01 * 10 * 25)


def test_an_estimate_that_fails_is_over() -> None:
    param, optimizer = one_weight()
    with pytest.raises(KeyError), optimizer.estimating(1):
        raise KeyError
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert param.item() != 1.0


def test_no_tokens_are_refused() -> None:
    _, optimizer = one_weight()
    with pytest.raises(ValueError, match="target_tokens=0"), optimizer.estimating(0):
        pass


@pytest.mark.parametrize(
    ("rho", "tokens", "moved"), [(0.5, 10, 0.08), (1.0, 10, 0.04), (0.5, 20, 0.04), (0.1, 10, 0.1)]
)
def test_rho_and_target_tokens_scale_the_step(rho: float, tokens: int, moved: float) -> None:
    """h = 0.01 * B * 1 and m = 0.04, so lr m / (rho h) is 0.1 * 0.04 / (0.01 rho B); at most lr."""
    param, optimizer = one_weight(rho=rho)
    estimate(optimizer, param, 1.0, tokens)
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert 1 - param.item() == pytest.approx(moved)


def test_the_interval_says_how_often_curvature_is_averaged() -> None:
    found = {}
    for interval in (1, 5):
        param, optimizer = one_weight(hessian_interval=interval)
        ones: list[list[Tensor | None]] = [[torch.ones(1)] * 10]
        drive(optimizer, [param], ones, ones, tokens=1)
        found[interval] = optimizer.state[param]["hessian"].item()
    assert found == {1: pytest.approx(1 - 0.99**10), 5: pytest.approx(1 - 0.99**2)}


# -- the estimator ------------------------------------------------------------------------------------------


def gauss_newton_diagonal(weight: Tensor, inputs: Tensor) -> Tensor:
    """The diagonal of the mean over inputs [B, D] of J^T (diag(p) - p p^T) J, for logits `inputs @ weight.T` [B, C]."""
    total = torch.zeros(weight.numel(), dtype=weight.dtype)
    for x in inputs:
        jacobian = torch.autograd.functional.jacobian(lambda w, x=x: w @ x, weight).reshape(-1, weight.numel())
        p = torch.softmax(weight @ x, 0)
        total += (jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian).diagonal()
    return (total / len(inputs)).reshape(weight.shape)


class RunningMean:
    """The weighted mean of estimates, taken through `estimating` by setting the share of each new one."""

    def __init__(self, weight: Tensor, inputs: Tensor) -> None:
        self.weight = nn.Parameter(weight)
        self.inputs = inputs
        self.optimizer = Sophia([self.weight])
        self.total = 0.0

    def add(self, labels: Tensor, share: float) -> None:
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.inputs @ self.weight.T, labels).backward()
        self.total += share
        self.optimizer.param_groups[0]["betas"] = (0.96, 1 - share / self.total)
        with self.optimizer.estimating(len(labels)):
            self.optimizer.step()

    @property
    def mean(self) -> Tensor:
        return self.optimizer.state[self.weight]["hessian"]  # type: ignore[no-any-return]


def test_the_estimate_is_unbiased() -> None:
    """Over all 27 outcomes of drawing labels for 3 inputs, each weighed with its chance, it is the exact diagonal."""
    generator = torch.Generator().manual_seed(5)
    weight, inputs = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    estimates = RunningMean(weight, inputs)
    p = torch.softmax(inputs @ weight.T, 1)
    for labels in itertools.product(range(3), repeat=3):
        estimates.add(torch.tensor(labels), p[torch.arange(3), labels].prod().item())
    torch.testing.assert_close(estimates.mean, gauss_newton_diagonal(weight, inputs), rtol=1e-12, atol=0)


def test_drawn_labels_find_the_gauss_newton_diagonal() -> None:
    """2,000 labels: 500 batches of 4 inputs.

    Each input has two features of its own, so an element of the gradient comes from one label and no products of two
    labels add noise. Its square takes the values p^2 and (1 - p)^2; with 3 classes and p near 1/3 its deviation is 0.71
    of its mean, and 500 of them give 0.71 / sqrt(500) = 3.2 %.
    """
    generator = torch.Generator().manual_seed(0)
    weight = 0.1 * torch.randn(3, 8, generator=generator, dtype=torch.float64)
    inputs = torch.block_diag(*torch.randn(4, 1, 2, generator=generator, dtype=torch.float64))
    estimates = RunningMean(weight.clone(), inputs)
    p = torch.softmax(inputs @ weight.T, 1)
    for _ in range(500):
        estimates.add(torch.multinomial(p, 1, generator=generator).squeeze(1), 1.0)
    truth = gauss_newton_diagonal(weight, inputs)
    assert (estimates.mean - truth).norm() / truth.norm() < 0.05
