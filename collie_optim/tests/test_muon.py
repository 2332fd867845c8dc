"""Muon against its equations in float64 and against torch's own, and AdamW for what is no hidden matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from elementwise_cases import run, start, through_a_file
from torch import Tensor, nn

from collie_optim.muon import COEFFICIENTS, Muon, orthogonalized

SHAPES = [(6, 4), (4, 6), (5, 5)]


def gradients(shape: tuple[int, ...], steps: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(steps)]


def muon(
    theta: Tensor, grads: Sequence[Tensor], *, lr: float, weight_decay: float, beta: float, nesterov: bool
) -> tuple[Tensor, Tensor]:
    """Line by line in float64; the quintic acts on singular values, so here it is applied to them alone."""
    m = torch.zeros_like(theta)
    for g in grads:
        m = beta * m + (1 - beta) * g
        u = beta * m + (1 - beta) * g if nesterov else m
        left, values, right = torch.linalg.svd(u / u.norm(), full_matrices=False)
        a, b, c = COEFFICIENTS
        for _ in range(5):
            values = a * values + b * values**3 + c * values**5
        scale = max(1.0, theta.shape[0] / theta.shape[1]) ** 0.5
        theta = (1 - lr * weight_decay) * theta - lr * scale * (left * values) @ right
    return theta, m


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-6)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_follows_its_equations(nesterov: bool, dtype: torch.dtype, tolerance: float) -> None:
    for number, shape in enumerate(SHAPES):
        param = nn.Parameter(start(shape, number).to(dtype))
        if number == 0:
            param = nn.Parameter(start(shape[::-1], number).to(dtype).t())  # not contiguous
        grads = [grad.to(dtype) for grad in gradients(shape, 50, number)]
        options = {"lr": 1e-3, "weight_decay": 0.1, "nesterov": nesterov}
        theta, m = muon(param.detach().double().clone(), [g.double() for g in grads], beta=0.95, **options)  # type: ignore[arg-type]
        optimizer = Muon([param], momentum=0.95, **options)  # type: ignore[arg-type]
        run(optimizer, [param], [grads])
        torch.testing.assert_close(param.detach().double(), theta, rtol=0, atol=tolerance)
        torch.testing.assert_close(optimizer.state[param]["momentum"].double(), m, rtol=0, atol=1e-6)


def test_singular_values_become_near_one() -> None:
    for shape in SHAPES:
        matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        values = torch.linalg.svdvals(orthogonalized(matrix, 5, torch.float64))
        assert values.min() > 0.5
        assert values.max() < 1.3


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
def test_it_is_torchs_muon(scale: str) -> None:
    ours, theirs = (
        [nn.Parameter(start(shape, number).float()) for number, shape in enumerate(SHAPES)] for _ in range(2)
    )
    grads = [[grad.float() for grad in gradients(shape, 20, number)] for number, shape in enumerate(SHAPES)]
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "momentum": 0.9}
    run(Muon(ours, scale=scale, ns_dtype="bfloat16", **options), ours, grads)  # type: ignore[arg-type]
    run(torch.optim.Muon(theirs, adjust_lr_fn=scale, **options), theirs, grads)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def groups_of(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [
        {"params": [p for p in params if p.ndim == 2], "role": "hidden", "weight_decay": 0.1},
        {"params": [p for p in params if p.ndim != 2], "role": "other", "weight_decay": 0.0},
    ]


def test_what_is_no_hidden_matrix_is_adamws() -> None:
    shapes: list[tuple[int, ...]] = [(4, 3), (5,), (), (2, 3, 4)]
    ours, theirs = ([nn.Parameter(start(shape, n).float()) for n, shape in enumerate(shapes)] for _ in range(2))
    grads = [[grad.float() for grad in gradients(shape, 20, n)] for n, shape in enumerate(shapes)]
    optimizer = Muon(groups_of(ours), adamw_lr=3e-3, adamw_betas=(0.8, 0.9), adamw_eps=1e-6)
    assert [group["lr"] for group in optimizer.param_groups] == [2e-2, 3e-3]
    run(optimizer, ours, grads)
    reference = torch.optim.AdamW(theirs[1:], lr=3e-3, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.0, fused=True)
    run(reference, theirs[1:], grads[1:])
    for one, other in zip(ours[1:], theirs[1:], strict=True):
        assert torch.equal(one, other)


def test_parameters_without_gradient_are_left_alone() -> None:
    params = [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))]
    optimizer = Muon(groups_of(params))
    params[0].grad = torch.ones(2, 2)
    optimizer.step()
    assert list(optimizer.state) == [params[0]]
    assert torch.equal(params[1].detach(), torch.ones(2, 2))


def test_resumed_run_is_bit_identical() -> None:
    shapes: list[tuple[int, ...]] = [(4, 3), (3, 4), (5,)]
    grads = [[grad.float() for grad in gradients(shape, 30, n)] for n, shape in enumerate(shapes)]

    def fresh() -> tuple[list[nn.Parameter], Muon]:
        params = [nn.Parameter(start(shape, n).float()) for n, shape in enumerate(shapes)]
        return params, Muon(groups_of(params))

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


def test_vectors_without_a_role_are_refused() -> None:
    with pytest.raises(ValueError, match="for matrices; put vectors"):
        Muon([nn.Parameter(torch.zeros(3))])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"adamw_betas": (0.9, 1.0)}, "adamw_betas"),
        ({"scale": "large"}, "scale='large'"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Muon([nn.Parameter(torch.zeros(1, 1))], **options)


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="dense"):
        Muon(embedding.parameters()).step()
