"""AdaLomo: an adaptive learning rate with factored second moments, in an update that is part of backward.

Lv et al., "AdaLomo: Low-memory Optimization with Adaptive Learning Rate", arXiv 2310.10195, Algorithm 1. For a matrix
G_t of gradients [n, m], with 1 the vector of ones:

    r_t = b_t r_{t-1} + (1 - b_t) (G_t^2 + eps_1) 1 / m          rows,    [n]
    c_t = b_t c_{t-1} + (1 - b_t) 1^T (G_t^2 + eps_1) / n        columns, [m]
    V_t = r_t c_t / mean(r_t)                                    second moment, rank one
    U_t = G_t / sqrt(V_t)
    theta_t = theta_{t-1} - lr max(eps_2, RMS(theta_{t-1})) (U_t / max(1, RMS(U_t) / d) + wd theta_{t-1})

Where the paper and the authors' code differ:
* Algorithm 1 prints U = G / V. The text calls V the second moment and compares with Adam, and the code takes the root:
  so do we.
* Algorithm 1 has a constant decay b, the code b_t = 1 - t^-0.8 (Adafactor's, which needs no bias correction). We follow
  the code, since its results are the published ones; `beta` sets a constant.
* Sums or means in r and c: V is the same.
* Weight decay is the code's. Tensors of more than two dimensions, which the code does not factor, are factored as
  stacks of matrices; vectors keep all their second moments.

With tensor parallelism every statistic (r, c, both RMS) is that of the whole tensor, whatever part of it a rank holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from collie_core.api import Whole, whole_of
from collie_optim.fused import FusedBase, require_at_least_0
from collie_optim.kernels import entries_at_a_time

BLOCK = 3 << 17  # entries looked at at a time on a CPU: they stay in the cache; all the memory that an update takes


def adalomo_update(
    param: Tensor,
    grad: Tensor,
    row: Tensor,
    col: Tensor,
    *,
    lr: float,
    beta: float,
    eps: tuple[float, float],
    clip_threshold: float,
    weight_decay: float,
    whole: Whole,
) -> None:
    """One step for a stack of matrices, in place on `param`, `row` and `col`.

    `param`, `grad` [..., n, m]; `row` [..., n], `col` [..., m]. Of what is cut, these are this rank's parts.
    """
    *_, rows, cols = whole.shape(param)
    rows_are_cut, cols_are_cut = whole.dim == param.ndim - 2, whole.dim == param.ndim - 1
    scratch = row.new_empty(_rows_at_a_time(param), param.shape[-1])
    row_sum, col_sum = torch.empty_like(row), torch.zeros_like(col)
    for g, r, c in _matrices(grad, row_sum, col_sum):
        _sums_of_squares(g, r, c, scratch)
    row.lerp_((whole.sum(row_sum) if cols_are_cut else row_sum).div_(cols).add_(eps[0]), 1 - beta)
    col.lerp_((whole.sum(col_sum) if rows_are_cut else col_sum).div_(rows).add_(eps[0]), 1 - beta)
    # The mean of the rows is that of the columns, since both are the mean of all entries: take what is whole here.
    mean = (col if rows_are_cut else row).mean(-1, keepdim=True)
    a, b = mean / row, col.reciprocal()  # 1 / V = a b
    kept = grad.dtype == scratch.dtype  # the last squares are still in the scratch, so go backwards
    for g, r, v in reversed(list(_matrices(grad, row_sum, b))):
        _weighted_squares(g, v, r, scratch, kept=kept)
        kept = False
    squares = row_sum.mul_(a).sum()
    rate, shrink = _rates(param, squares, lr, eps[1], clip_threshold, weight_decay, whole)
    for p, g, u, v in _matrices(param, grad, a.sqrt_().mul_(rate), b.sqrt_()):
        _apply(p, g, u, v, shrink, scratch)


def adalomo_vector_update(
    param: Tensor,
    grad: Tensor,
    square: Tensor,
    *,
    lr: float,
    beta: float,
    eps: tuple[float, float],
    clip_threshold: float,
    weight_decay: float,
    whole: Whole,
) -> None:
    """One step for a vector or a number, in place on `param` and `square`, its second moments."""
    g = grad.to(square.dtype)
    square.lerp_(g.square().add_(eps[0]), 1 - beta)
    update = g * square.rsqrt()
    rate, shrink = _rates(param, update.square().sum(), lr, eps[1], clip_threshold, weight_decay, whole)
    param.copy_((param if shrink is None else param * shrink).sub(update * rate))


def _rates(
    param: Tensor, squares: Tensor, lr: float, eps: float, threshold: float, weight_decay: float, whole: Whole
) -> tuple[Tensor, Tensor | None]:
    """What U_t and theta_{t-1} are multiplied by, None: 1; `squares` is the sum of those of this rank's part of U_t."""
    own = torch.stack([torch.linalg.vector_norm(param, dtype=squares.dtype).square_(), squares])
    weight_rms, update_rms = whole.sum(own).div_(whole.numel(param)).sqrt_().unbind()
    relative = weight_rms.clamp_(min=eps)
    shrink = 1 - relative * (lr * weight_decay) if weight_decay else None
    return relative.mul(lr * threshold).div_(update_rms.clamp_(min=threshold)), shrink


def _matrices(*stacks: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of the matrices of a stack, each with the vectors that belong to it."""
    if stacks[0].ndim == 2:
        yield stacks
        return
    for parts in zip(*(stack.unbind(0) for stack in stacks), strict=True):
        yield from _matrices(*parts)


def _rows_at_a_time(stack: Tensor) -> int:
    entries = entries_at_a_time(stack.device, BLOCK)
    return min(stack.shape[-2], max(1, entries // max(1, stack.shape[-1])))


def _in_blocks(scratch: Tensor, grad: Tensor, *others: Tensor, backwards: bool = False) -> Iterator[tuple[Tensor, ...]]:
    """The rows of `grad` and of what belongs to them, block by block, after a part of `scratch` for a block.

    The gradient comes in the precision of the scratch; when it is of another, it comes in the scratch itself.
    """
    whole, rows = grad.shape[0], scratch.shape[0]
    begins = range(0, whole, max(1, rows))
    for begin in reversed(begins) if backwards else begins:
        out, block = scratch, (grad, *others)
        if rows < whole:
            size = min(rows, whole - begin)
            out, block = scratch[:size], tuple(tensor.narrow(0, begin, size) for tensor in block)
        g, *parts = block
        yield out, g if g.dtype == out.dtype else out.copy_(g), *parts


def _sums_of_squares(grad: Tensor, row_sum: Tensor, col_sum: Tensor, scratch: Tensor) -> None:
    """The sums over each row of `grad` [n, m] into `row_sum`; those over each column are added to `col_sum`."""
    for out, g, r in _in_blocks(scratch, grad, row_sum):
        squares = torch.mul(g, g, out=out)
        torch.sum(squares, 1, out=r)
        col_sum.add_(squares.sum(0))


def _weighted_squares(grad: Tensor, weights: Tensor, row_sum: Tensor, scratch: Tensor, *, kept: bool) -> None:
    """The sum over each row of the squares of `grad` [n, m], times the `weights` [m] of the columns, into `row_sum`.

    The last block comes first; `kept`: its squares are in the scratch.
    """
    for out, g, r in _in_blocks(scratch, grad, row_sum, backwards=True):
        squares = out if kept else torch.mul(g, g, out=out)
        torch.mv(squares, weights, out=r)
        kept = False


def _apply(param: Tensor, grad: Tensor, a: Tensor, b: Tensor, shrink: Tensor | None, scratch: Tensor) -> None:
    """param <- shrink param - a G b, for `a` [n] and `b` [m]; below float32 it is rounded once."""
    for out, g, p, u in _in_blocks(scratch, grad, param, a):
        update = torch.mul(g, b, out=out)
        weights = p if p.dtype == b.dtype else p.to(b.dtype)
        if shrink is not None:
            weights.mul_(shrink)
        weights.addcmul_(update, u.unsqueeze(1), value=-1)
        if weights is not p:
            p.copy_(weights)


class AdaLomo(FusedBase):
    """AdaLomo as a torch optimizer that `collie_core` calls in backward.

    State of a matrix: `step`, `row` and `col`; of a vector `step` and `square`; float32 at least.

    Args:
        decay_rate: the exponent in b_t = 1 - t^decay_rate.
        beta: a constant b instead; None: the above.
        eps: added to squared gradients; and the least RMS that a tensor is taken to have.
        clip_threshold: d, the largest RMS of an update in units of the learning rate.

    Raises:
        ValueError: an option is out of its range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        decay_rate: float = -0.8,
        beta: float | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        clip_grad_value: float | None = None,
    ) -> None:
        require_at_least_0(lr=lr, weight_decay=weight_decay, clip_grad_value=clip_grad_value, eps=min(eps))
        if not decay_rate <= 0:
            raise ValueError(f"decay_rate={decay_rate} must be at most 0")
        if beta is not None and not 0 <= beta < 1:
            raise ValueError(f"beta={beta} must be at least 0 and less than 1")
        if not clip_threshold > 0:
            raise ValueError(f"clip_threshold={clip_threshold} must be greater than 0")
        options = {"lr": lr, "weight_decay": weight_decay, "decay_rate": decay_rate, "beta": beta, "eps": eps}
        super().__init__(params, {**options, "clip_threshold": clip_threshold, "clip_grad_value": clip_grad_value})

    def _update(self, param: nn.Parameter, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        if not state:
            state.update(self._start(param))
        state["step"] += 1
        options = {
            "lr": group["lr"],
            "beta": 1 - state["step"].item() ** group["decay_rate"] if group["beta"] is None else group["beta"],
            "eps": group["eps"],
            "clip_threshold": group["clip_threshold"],
            "weight_decay": group["weight_decay"],
            "whole": whole_of(param),
        }
        if param.ndim >= 2:
            adalomo_update(param, grad, state["row"], state["col"], **options)
        else:
            adalomo_vector_update(param, grad, state["square"], **options)

    def _start(self, param: Tensor) -> dict[str, Tensor]:
        """Zeros. The first step takes b_1 = 0 and forgets them, unless a constant beta is set."""
        like: dict[str, Any] = {"dtype": torch.promote_types(param.dtype, torch.float32), "device": param.device}
        step = {"step": torch.zeros(())}
        if param.ndim < 2:
            return step | {"square": torch.zeros(param.shape, **like)}
        *stack, rows, cols = param.shape
        return step | {"row": torch.zeros(*stack, rows, **like), "col": torch.zeros(*stack, cols, **like)}
