"""Lion against the paper, and its promises as a torch optimizer."""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from collie_optim.lion import Lion, lion_update, lion_update_all

SHAPES: list[tuple[int, ...]] = [(), (5,), (3, 4), (2, 3, 4)]


def algorithm_2(
    param: Tensor, grads: Sequence[Tensor], *, lr: float, weight_decay: float, beta1: float, beta2: float
) -> tuple[Tensor, Tensor]:
    """Algorithm 2 of arXiv 2302.06675, line by line in float64; returns (theta, m)."""
    theta, m = param.double().clone(), torch.zeros_like(param, dtype=torch.float64)
    for grad in grads:
        g = grad.double()
        c = beta1 * m + (1 - beta1) * g
        theta = theta - lr * (torch.sign(c) + weight_decay * theta)
        m = beta2 * m + (1 - beta2) * g
    return theta, m


def gradients(shape: tuple[int, ...], steps: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(steps)]


def start(shape: tuple[int, ...], seed: int) -> Tensor:
    """Numbers of the size of weights: near 1, rounding to float32 alone costs up to 3e-6 in 50 additions."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return 0.02 * torch.randn(shape, generator=generator, dtype=torch.float64)


def run(optimizer: Lion, params: Sequence[Tensor], grads: Sequence[Sequence[Tensor]]) -> None:
    for step in range(len(grads[0])):
        for param, sequence in zip(params, grads, strict=True):
            param.grad = sequence[step].to(param.dtype)
        optimizer.step()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_follows_algorithm_2_for_all_shapes_and_groups(dtype: torch.dtype, tolerance: float) -> None:
    options = [
        {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.99)},
        {"lr": 3e-3, "weight_decay": 0.0, "betas": (0.95, 0.98)},
    ]
    params = [nn.Parameter(start(shape, i).to(dtype)) for i, shape in enumerate(SHAPES)]
    # Rounded to the dtype of the test, so that reference and optimizer are given the same numbers.
    grads = [[g.to(dtype) for g in gradients(shape, 50, i)] for i, shape in enumerate(SHAPES)]
    expected = []
    for i, (param, sequence) in enumerate(zip(params, grads, strict=True)):
        chosen = options[i % 2]
        beta1, beta2 = chosen["betas"]  # type: ignore[misc]
        expected.append(
            algorithm_2(
                param.detach(),
                sequence,
                lr=chosen["lr"],  # type: ignore[arg-type]
                weight_decay=chosen["weight_decay"],  # type: ignore[arg-type]
                beta1=beta1,
                beta2=beta2,
            )
        )
    optimizer = Lion([{"params": params[0::2], **options[0]}, {"params": params[1::2], **options[1]}])
    run(optimizer, params, grads)
    for param, (theta, m) in zip(params, expected, strict=True):
        torch.testing.assert_close(param.detach().double(), theta, rtol=0, atol=tolerance)
        torch.testing.assert_close(optimizer.state[param]["exp_avg"].double(), m, rtol=0, atol=tolerance)


def test_non_contiguous_parameter_and_gradient() -> None:
    values, sequence = start((4, 6), 7), gradients((6, 4), 50, 7)
    param = nn.Parameter(values.t())  # strides (1, 6)
    assert not param.is_contiguous()
    theta, _ = algorithm_2(values.t(), sequence, lr=1e-3, weight_decay=0.1, beta1=0.9, beta2=0.99)
    run(Lion([param], lr=1e-3, weight_decay=0.1), [param], [sequence])
    torch.testing.assert_close(param.detach(), theta, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_grouped_update_equals_the_single_one_bit_for_bit(dtype: torch.dtype) -> None:
    options = {"lr": 1e-2, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.99}
    single = [[start(shape, i).to(dtype) for i, shape in enumerate(SHAPES)] for _ in range(3)]
    single[2] = [torch.zeros_like(tensor) for tensor in single[2]]
    grouped = copy.deepcopy(single)
    for _ in range(5):
        for param, grad, momentum in zip(*single, strict=True):
            lion_update(param, grad, momentum, **options)
        lion_update_all(*grouped, **options)
    for one, other in zip(single[0] + single[2], grouped[0] + grouped[2], strict=True):
        assert torch.equal(one, other)


def test_every_weight_moves_by_exactly_lr() -> None:
    param = nn.Parameter(torch.zeros(100))
    param.grad = torch.logspace(-6, 6, 100)
    Lion([param], lr=0.25).step()
    assert torch.equal(param.detach(), torch.full((100,), -0.25))


def test_reads_the_learning_rate_each_step() -> None:
    param = nn.Parameter(torch.zeros(1))
    optimizer = Lion([param], lr=1.0)
    positions = []
    for lr in (1.0, 0.5, 0.0):
        optimizer.param_groups[0]["lr"] = lr
        param.grad = torch.ones(1)
        optimizer.step()
        positions.append(param.item())
    assert positions == [-1.0, -1.5, -1.5]


def test_parameters_without_gradient_are_left_alone() -> None:
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = Lion([used, unused], lr=0.1, weight_decay=0.5)
    used.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(unused.detach(), torch.ones(2))
    assert list(optimizer.state) == [used]
    assert not torch.equal(used.detach(), torch.ones(2))


def test_mixed_dtypes_in_one_group() -> None:
    params = [nn.Parameter(torch.zeros(3, dtype=d)) for d in (torch.float32, torch.bfloat16, torch.float64)]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = Lion(params, lr=0.5)
    optimizer.step()
    assert all(torch.equal(p.detach(), torch.full_like(p, -0.5)) for p in params)
    assert [optimizer.state[p]["exp_avg"].dtype for p in params] == [p.dtype for p in params]


def test_resumed_run_is_bit_identical() -> None:
    grads = [gradients(shape, 40, i) for i, shape in enumerate(SHAPES)]

    def fresh() -> tuple[list[nn.Parameter], Lion]:
        params = [nn.Parameter(start(shape, i).float()) for i, shape in enumerate(SHAPES)]
        groups = [{"params": params[:2], "lr": 2e-3}, {"params": params[2:], "weight_decay": 0.3}]
        return params, Lion(groups, lr=1e-3)

    straight, optimizer = fresh()
    run(optimizer, straight, grads)

    first, before = fresh()
    run(before, first, [sequence[:15] for sequence in grads])
    second, after = fresh()
    for param, saved in zip(second, first, strict=True):
        param.data.copy_(saved.data)
    after.load_state_dict(_through_a_file(before.state_dict()))
    run(after, second, [sequence[15:] for sequence in grads])
    for one, other in zip(straight, second, strict=True):
        assert torch.equal(one, other)


def _through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


def test_converges_on_a_quadratic() -> None:
    param = nn.Parameter(torch.full((8,), 5.0))
    optimizer = Lion([param], lr=0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.001, total_iters=1000)
    for _ in range(1000):
        optimizer.zero_grad()
        param.square().sum().backward()
        optimizer.step()
        schedule.step()
    assert param.detach().abs().max() < 0.05


def test_closure_runs_with_gradients_and_its_loss_comes_back() -> None:
    param = nn.Parameter(torch.ones(1))
    optimizer = Lion([param], lr=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 1.0
    assert param.item() == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"betas": (1.0, 0.9)}, "betas"),
        ({"betas": (0.9, -0.1)}, "betas"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Lion([nn.Parameter(torch.zeros(1))], **options)


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="dense"):
        Lion(embedding.parameters()).step()
