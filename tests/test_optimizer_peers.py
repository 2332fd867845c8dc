"""Our optimizers beside those of other packages: the same weights after 25 steps, or which line they miss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import adan_pytorch
import lion_pytorch
import pytest
import pytorch_optimizer
import torch
from lion_pytorch.foreach import Lion as ForeachLion
from torch import Tensor, nn

from collie_optim.adan import Adan
from collie_optim.lion import Lion
from collie_optim.sophia import Sophia

STEPS, TOKENS = 25, 64
SHAPES: list[tuple[int, ...]] = [(7,), (4, 5), (2, 3, 4)]
precisions = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
Make = Callable[[list[nn.Parameter]], Any]


def start(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [
        nn.Parameter((0.02 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype))
        for shape in SHAPES
    ]


def gradients(dtype: torch.dtype, seed: int = 2) -> list[list[Tensor]]:
    """Of all parameters, step by step."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]
        for _ in range(STEPS)
    ]


def set_gradients(params: Sequence[nn.Parameter], grads: Sequence[Tensor]) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()  # some packages write into it


def weights_after(make: Make, dtype: torch.dtype, steps: int = STEPS) -> list[Tensor]:
    params = start(dtype)
    optimizer = make(params)
    for grads in gradients(dtype)[:steps]:
        set_gradients(params, grads)
        optimizer.step()
    return [param.detach() for param in params]


def distance(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))


def test_the_steps_are_long_enough_to_tell() -> None:
    moved = distance(weights_after(lambda params: Lion(params, lr=1e-3), torch.float64), start(torch.float64))
    assert moved > 1e-3


@precisions
@pytest.mark.parametrize("peer", [lion_pytorch.Lion, ForeachLion, pytorch_optimizer.Lion])
def test_lion_equals(peer: Any, dtype: torch.dtype, tolerance: float) -> None:
    options = {"lr": 1e-3, "betas": (0.9, 0.98), "weight_decay": 0.3}
    ours = weights_after(lambda params: Lion(params, **options), dtype)
    theirs = weights_after(lambda params: peer(params, **options), dtype)
    assert distance(ours, theirs) < tolerance


@precisions
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("proximal", [False, True])
def test_adan_equals_pytorch_optimizer(proximal: bool, foreach: bool, dtype: torch.dtype, tolerance: float) -> None:
    options = {"lr": 1e-3, "betas": (0.95, 0.9, 0.98), "weight_decay": 0.3}
    ours = weights_after(lambda params: Adan(params, proximal=proximal, **options), dtype)
    theirs = weights_after(
        lambda params: pytorch_optimizer.Adan(params, weight_decouple=not proximal, foreach=foreach, **options), dtype
    )
    assert distance(ours, theirs) < tolerance


def theirs_and_ours(steps: int) -> tuple[list[Tensor], list[Tensor]]:
    """adan-pytorch and our Adan with the same options, in float64."""
    theirs = weights_after(
        lambda params: adan_pytorch.Adan(params, lr=1e-3, betas=(0.05, 0.1, 0.02), weight_decay=0.3),
        torch.float64,
        steps,
    )
    ours = weights_after(
        lambda params: Adan(params, lr=1e-3, betas=(0.95, 0.9, 0.98), weight_decay=0.3), torch.float64, steps
    )
    return theirs, ours


def test_adan_pytorch_loses_the_first_gradient() -> None:
    """It updates m, v and n from the second step on (`if step > 0`). Algorithm 1 begins with m_0 = g_0 and n_0 = g_0^2.

    So its first step does nothing but decay. Later it corrects averages of k gradients as if they were of k + 1, and
    stays apart.
    """
    theirs, ours = theirs_and_ours(steps=1)
    decayed = [param.detach() / (1 + 1e-3 * 0.3) for param in start(torch.float64)]
    assert distance(theirs, decayed) < 1e-15
    assert distance(ours, decayed) == pytest.approx(1e-3, rel=0.01)
    assert distance(*theirs_and_ours(steps=STEPS)) > 1e-3


@precisions
@pytest.mark.parametrize("foreach", [False, True])
def test_sophia_equals_pytorch_optimizer_given_the_curvature(
    foreach: bool, dtype: torch.dtype, tolerance: float
) -> None:
    """`SophiaH` estimates the curvature in another way, so it is given ours. Its step has no rho and clips at `p`:

    lr clip(m / max(rho h, eps), 1) = (lr / rho) clip(m / max(h, eps / rho), rho).
    """
    lr, rho, eps, decay, interval = 1e-3, 0.05, 1e-4, 0.3, 4
    ours, theirs = start(dtype), start(dtype)
    sophia = Sophia(ours, lr=lr, rho=rho, eps=eps, weight_decay=decay, hessian_interval=interval)
    peer = pytorch_optimizer.SophiaH(
        theirs, lr=lr / rho, p=rho, eps=eps / rho, weight_decay=decay * rho, update_period=10**9, foreach=foreach
    )
    clipped = []
    for grads, drawn in zip(gradients(dtype), gradients(dtype, seed=3), strict=True):
        hessian = None
        if sophia.curvature_due():
            set_gradients(ours, drawn)
            with sophia.estimating(TOKENS):
                sophia.step()
            hessian = [TOKENS * grad.square() for grad in drawn]
        set_gradients(ours, grads)
        set_gradients(theirs, grads)
        sophia.step()
        peer.step(hessian=hessian)
        state = sophia.state[ours[1]]
        clipped.append(state["exp_avg"].abs() >= (rho * state["hessian"]).clamp(min=eps))
    assert distance([param.detach() for param in ours], [param.detach() for param in theirs]) < tolerance
    assert 0.1 < torch.stack(clipped).double().mean() < 0.9  # both sides of the clip were met
