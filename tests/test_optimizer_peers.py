"""Our optimizers beside those of other packages: the same weights after 25 steps, or which line they miss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import adan_pytorch
import lion_pytorch
import lomo_optim
import pytest
import pytorch_optimizer
import torch
from lion_pytorch.foreach import Lion as ForeachLion
from torch import Tensor, nn

from collie_normuon.optimizer import NorMuon
from collie_optim.adalomo import AdaLomo
from collie_optim.adan import Adan
from collie_optim.lion import Lion
from collie_optim.lomo import Lomo
from collie_optim.muon import Muon
from collie_optim.sophia import Sophia

STEPS, TOKENS = 25, 64
SHAPES: list[tuple[int, ...]] = [(7,), (4, 5), (2, 3, 4)]
UP_TO_MATRICES = 2  # the first shapes
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


def weights_after(make: Make, dtype: torch.dtype, steps: int = STEPS, shapes: int = len(SHAPES)) -> list[Tensor]:
    params = start(dtype)[:shapes]
    optimizer = make(params)
    for grads in gradients(dtype)[:steps]:
        set_gradients(params, grads[:shapes])
        optimizer.step()
    return [param.detach() for param in params]


def weights_after_fused(make: Any, dtype: torch.dtype, lr: float, shapes: int = len(SHAPES)) -> list[Tensor]:
    """With an update in backward: `make` takes a module, and the loss has the same gradients as above."""
    params = start(dtype)[:shapes]
    optimizer = make(nn.ParameterList(params))
    for grads in gradients(dtype):
        loss = torch.stack([(param * grad).sum() for param, grad in zip(params, grads[:shapes], strict=True)]).sum()
        optimizer.fused_backward(loss, lr)
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


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["foreach", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lomo_equals_torchs_sgd_bit_for_bit(dtype: torch.dtype, kind: str, decay: float) -> None:
    """The decay of torch's SGD is part of the gradient, so weights are multiplied by hand before its step."""
    lr = 1e-2
    theirs = start(dtype)
    sgd = torch.optim.SGD(theirs, lr=lr, **{kind: True})
    for grads in gradients(dtype):
        set_gradients(theirs, grads)
        for param in theirs:
            param.data.mul_(1 - lr * decay)
        sgd.step()
    ours = weights_after(lambda params: Lomo(params, lr=lr, weight_decay=decay), dtype)
    assert distance(ours, [param.detach() for param in theirs]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # they compute in float32 alone
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_lomo_equals_its_authors(decay: float, dtype: torch.dtype) -> None:
    ours = weights_after(lambda params: Lomo(params, lr=1e-2, weight_decay=decay), dtype)
    theirs = weights_after_fused(lambda model: lomo_optim.Lomo(model, weight_decay=decay), dtype, 1e-2)
    assert distance(ours, theirs) < 1e-6


def test_lomo_equals_pytorch_optimizer() -> None:
    """It has no decay."""
    ours = weights_after(lambda params: Lomo(params, lr=1e-2), torch.float32)
    assert distance(ours, weights_after_fused(pytorch_optimizer.LOMO, torch.float32, 1e-2)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # they compute in float32 alone
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_adalomo_equals_pytorch_optimizer(decay: float, dtype: torch.dtype) -> None:
    """It has no tensors of more than two dimensions."""
    ours = weights_after(lambda params: AdaLomo(params, lr=1e-2, weight_decay=decay), dtype, shapes=UP_TO_MATRICES)
    theirs = weights_after_fused(
        lambda model: pytorch_optimizer.AdaLOMO(model, weight_decay=decay), dtype, 1e-2, UP_TO_MATRICES
    )
    assert distance(ours, theirs) < 1e-6
    assert distance(ours, start(dtype)[:UP_TO_MATRICES]) > 1e-3


def adafactor_and_ours(decay: float, steps: int) -> tuple[list[Tensor], list[Tensor]]:
    """Of float64; torch's learning rate is at most 1 / sqrt(t), which is above it here."""
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": decay, "eps": (1e-30, 1e-3)}
    theirs = weights_after(lambda params: torch.optim.Adafactor(params, **options), torch.float64, steps)
    return theirs, weights_after(lambda params: AdaLomo(params, **options), torch.float64, steps)


def test_adalomo_without_decay_equals_torchs_adafactor() -> None:
    assert distance(*adafactor_and_ours(decay=0.0, steps=STEPS)) < 1e-12


def test_torchs_adafactor_decays_by_the_learning_rate_alone() -> None:
    """The last line of Algorithm 1 has lr max(eps_2, RMS(theta)) for the update, and the authors' code decays by it."""
    theirs, ours = adafactor_and_ours(decay=0.3, steps=1)
    updated, _ = adafactor_and_ours(decay=0.0, steps=1)
    for before, their, our, plain in zip(start(torch.float64), theirs, ours, updated, strict=True):
        theta = before.detach()
        rms = theta.square().mean().sqrt()
        torch.testing.assert_close(their, plain - 1e-2 * 0.3 * theta, rtol=0, atol=1e-12)
        torch.testing.assert_close(our, plain - 1e-2 * rms * 0.3 * theta, rtol=0, atol=1e-12)
    assert distance(*adafactor_and_ours(decay=0.3, steps=STEPS)) > 1e-4


@pytest.mark.skipif(torch.cuda.is_available(), reason="it can be made where there is CUDA")
def test_the_authors_adalomo_needs_cuda() -> None:
    """Its states are made with `.cuda()`, so there is nothing to compare with on a CPU."""
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
        lomo_optim.AdaLomo(nn.Linear(2, 2))


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
def test_muon_equals_pytorch_optimizer(scale: Any, foreach: bool) -> None:
    """It orthogonalizes in bfloat16 alone."""
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.3, "momentum": 0.9}

    def theirs(params: list[nn.Parameter]) -> Any:
        groups = [{"params": params[1:2], "use_muon": True}]
        return pytorch_optimizer.Muon(groups, use_adjusted_lr=scale != "original", foreach=foreach, **options)

    ours = weights_after(lambda params: Muon(params[1:2], scale=scale, ns_dtype="bfloat16", **options), torch.float32)
    assert distance(ours, weights_after(theirs, torch.float32)) < 1e-6
    assert distance(ours[1:2], start(torch.float32)[1:2]) > 1e-3


@pytest.mark.parametrize("foreach", [False, True])
def test_normuon_equals_pytorch_optimizer(foreach: bool) -> None:
    """Told to follow the paper and not the authors' code; it orthogonalizes in bfloat16 alone."""
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.3, "eps": 1e-8}

    def theirs(params: list[nn.Parameter]) -> Any:
        groups = [{"params": params[1:2], "use_muon": True}]
        paper = {"nesterov": False, "update_scale": "match_rms"}
        return pytorch_optimizer.NorMuon(groups, foreach=foreach, **paper, **options)

    ours = weights_after(lambda params: NorMuon(params[1:2], ns_dtype="bfloat16", **options), torch.float32)
    assert distance(ours, weights_after(theirs, torch.float32)) < 1e-6
    assert distance(ours[1:2], start(torch.float32)[1:2]) > 1e-3
