"""What the tests of the element-wise optimizers share: parameters of all shapes, gradients, and how to run them."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

SHAPES: list[tuple[int, ...]] = [(), (5,), (3, 4), (2, 3, 4), (6, 4)]
"""The last one is given transposed, so that it does not lie in one piece."""

Grads = list[Tensor | None]  # of one parameter, step by step
Reference = Callable[..., tuple[Tensor, ...]]
"""(start, the gradients that are not None, **options of the group) -> weights, then the state tensors."""


def gradients(shape: tuple[int, ...], steps: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(steps)]


def start(shape: tuple[int, ...], seed: int) -> Tensor:
    """Numbers of the size of weights: near 1, rounding to float32 alone costs up to 3e-6 in 50 additions."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return 0.02 * torch.randn(shape, generator=generator, dtype=torch.float64)


def problem(dtype: torch.dtype, steps: int = 50) -> tuple[list[nn.Parameter], list[Grads]]:
    """Parameters of all shapes, and their gradients; every second parameter has none at every seventh step.

    Gradients are rounded to the dtype, so that reference and optimizer are given the same numbers.
    """
    params, grads = [], []
    for number, shape in enumerate(SHAPES):
        values = start(shape, number).to(dtype)
        sequence: Grads = [grad.to(dtype) for grad in gradients(shape, steps, number)]
        if number == len(SHAPES) - 1:
            values = values.t()
            sequence = [None if grad is None else grad.t() for grad in sequence]
        if number % 2:
            sequence = [None if step % 7 == number else grad for step, grad in enumerate(sequence)]
        params.append(nn.Parameter(values))
        grads.append(sequence)
    assert not params[-1].is_contiguous()
    return params, grads


def run(optimizer: Optimizer, params: Sequence[Tensor], grads: Sequence[Sequence[Tensor | None]]) -> None:
    """A step for each gradient of the sequences, which are of one length."""
    for step in range(len(grads[0])):
        for param, sequence in zip(params, grads, strict=True):
            grad = sequence[step]
            param.grad = None if grad is None else grad.to(param.dtype, copy=True)  # keeps the strides
        optimizer.step()


def in_groups(params: Sequence[Tensor], options: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The parameters in turn over groups with these options."""
    return [{"params": list(params[i :: len(options)]), **chosen} for i, chosen in enumerate(options)]


def assert_follows(
    reference: Reference,
    make: Callable[[list[dict[str, Any]]], Optimizer],
    options: Sequence[dict[str, Any]],
    tensors: Sequence[str],
    dtype: torch.dtype,
) -> None:
    """The optimizer gives the reference's weights and state after 50 steps: to 1e-10 in float64, 1e-6 in float32."""
    params, grads = problem(dtype)
    expected = []
    for number, (param, sequence) in enumerate(zip(params, grads, strict=True)):
        given = [grad.double() for grad in sequence if grad is not None]
        expected.append(reference(param.detach().double().clone(), given, **options[number % len(options)]))
    optimizer = make(in_groups(params, options))
    run(optimizer, params, grads)
    for param, (theta, *state) in zip(params, expected, strict=True):
        found = [param.detach(), *(optimizer.state[param][name] for name in tensors)]
        for tensor, wanted in zip(found, [theta, *state], strict=True):
            tolerance = 1e-10 if dtype == torch.float64 else 1e-6
            torch.testing.assert_close(tensor.double(), wanted, rtol=0, atol=tolerance)


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """What comes back from `torch.save` and a `torch.load` that loads no code."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded
