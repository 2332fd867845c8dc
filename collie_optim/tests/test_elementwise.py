"""What Lion, Adan and Sophia promise alike as torch optimizers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from elementwise_cases import in_groups, problem, run, through_a_file
from torch import nn

from collie_optim.adan import Adan
from collie_optim.elementwise import ElementwiseOptimizer
from collie_optim.lion import Lion
from collie_optim.sophia import Sophia

OPTIMIZERS: list[type[Any]] = [Lion, Adan, Sophia]
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS)


@every_optimizer
def test_reads_the_learning_rate_each_step(make: type[Any]) -> None:
    param = nn.Parameter(torch.ones(1))
    optimizer = make([param], weight_decay=0.0)
    positions = [1.0]
    for lr in (0.2, 0.1, 0.0):
        optimizer.param_groups[0]["lr"] = lr
        param.grad = torch.ones(1)
        optimizer.step()
        positions.append(param.item())
    assert positions == pytest.approx([1.0, 0.8, 0.7, 0.7])  # all three move by lr under a constant gradient


@every_optimizer
def test_parameters_without_gradient_are_left_alone(make: type[Any]) -> None:
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = make([used, unused], lr=0.1, weight_decay=0.5)
    used.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(unused.detach(), torch.ones(2))
    assert list(optimizer.state) == [used]
    assert not torch.equal(used.detach(), torch.ones(2))


@pytest.mark.parametrize("make", [Adan, Sophia])
def test_each_parameter_counts_its_own_steps(make: type[Any]) -> None:
    params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    ones: list[torch.Tensor | None] = [torch.ones(2)] * 3
    optimizer = make(params)
    run(optimizer, params, [ones, [torch.ones(3), None, None]])
    steps = [optimizer.state[param]["step"] for param in params]
    assert [step.item() for step in steps] == [3, 1]
    assert all(step.dtype == torch.float32 and step.device.type == "cpu" for step in steps)


@every_optimizer
def test_mixed_dtypes_in_one_group(make: type[Any]) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    params = [nn.Parameter(torch.zeros(3, dtype=dtype)) for dtype in dtypes]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = make(params, lr=0.5, weight_decay=0.0)
    optimizer.step()
    for param in params:
        torch.testing.assert_close(param.detach(), torch.full_like(param, -0.5))
    assert [optimizer.state[param]["exp_avg"].dtype for param in params] == list(dtypes)


@every_optimizer
def test_resumed_run_is_bit_identical(make: type[Any]) -> None:
    options = [{"lr": 2e-3}, {"weight_decay": 0.3}]

    def fresh() -> tuple[list[nn.Parameter], Any]:
        params, _ = problem(torch.float32)
        return params, make(in_groups(params, options), lr=1e-3)

    _, grads = problem(torch.float32, steps=40)
    straight, optimizer = fresh()
    run(optimizer, straight, grads)

    first, before = fresh()
    run(before, first, [sequence[:15] for sequence in grads])
    second, after = fresh()
    for param, saved in zip(second, first, strict=True):
        param.data.copy_(saved.data)
    after.load_state_dict(through_a_file(before.state_dict()))
    run(after, second, [sequence[15:] for sequence in grads])
    for one, other in zip(straight, second, strict=True):
        assert torch.equal(one, other)
    assert after.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


@every_optimizer
def test_a_flat_slice_gives_the_same_bits(make: type[Any]) -> None:
    """ZeRO lays the parameters of a group in a row, wherever one ends, and adds keys to the group."""
    whole = [nn.Parameter(torch.linspace(-1, 1, 24).reshape(shape)) for shape in ((4, 6), (2, 3, 4))]
    flat = nn.Parameter(torch.cat([param.detach().view(-1) for param in whole])[5:41].clone())
    optimizer, sliced = make(whole), make([{"params": [flat], "name": "flat", "ds_grad_is_ready": True}])
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        for param in whole:
            param.grad = torch.randn(param.shape, generator=generator)
        flat.grad = torch.cat([param.grad.view(-1) for param in whole if param.grad is not None])[5:41].clone()
        optimizer.step()
        sliced.step()
    assert torch.equal(torch.cat([param.detach().view(-1) for param in whole])[5:41], flat)


@every_optimizer
def test_converges_on_a_quadratic(make: type[Any]) -> None:
    param = nn.Parameter(torch.linspace(-5.0, 5.0, 8))
    optimizer = make([param], lr=0.05, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.001, total_iters=1000)
    for _ in range(1000):
        optimizer.zero_grad()
        param.square().sum().backward()
        optimizer.step()
        schedule.step()
    assert param.detach().abs().max() < 0.05


@every_optimizer
def test_closure_runs_with_gradients_and_its_loss_comes_back(make: type[Any]) -> None:
    param = nn.Parameter(torch.ones(1))
    optimizer = make([param], lr=0.1, weight_decay=0.0)

    def closure() -> float:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 1.0
    assert param.item() == pytest.approx(0.9)


@every_optimizer
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"betas": (1.0, 0.9, 0.9)}, "betas"),
        ({"betas": (0.9, -0.1, 0.9)}, "betas"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"kernel": "fast"}, "kernel='fast' must be one of auto, eager, compiled"),
    ],
)
def test_options_out_of_range_are_refused(make: type[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make([nn.Parameter(torch.zeros(1))], **options)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (Adan, {"eps": 0.0}),
        (Adan, {"variant": "mine"}),
        (Adan, {"restart_steps": 0}),
        (Sophia, {"rho": 0.0}),
        (Sophia, {"eps": 0.0}),
        (Sophia, {"hessian_interval": 0}),
    ],
)
def test_own_options_out_of_range_are_refused(make: type[Any], options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        make([nn.Parameter(torch.zeros(1))], **options)


@every_optimizer
def test_sparse_gradients_are_refused(make: type[Any]) -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="dense"):
        make(embedding.parameters()).step()


@every_optimizer
def test_a_copy_keeps_the_kernel_and_a_saved_state_does_not(make: type[Any]) -> None:
    param = nn.Parameter(torch.zeros(1))
    optimizer: ElementwiseOptimizer = make([param], kernel="eager")
    assert copy.deepcopy(optimizer).kernel == "eager"
    other: ElementwiseOptimizer = make([param], kernel="compiled")
    other.load_state_dict(optimizer.state_dict())
    assert other.kernel == "compiled"
