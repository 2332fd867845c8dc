"""NorMuon: Muon whose updates are divided by the root mean square of their rows; AdamW for what is no hidden matrix.

Li et al., "NorMuon: Making Muon more efficient and scalable", arXiv 2510.05491, Algorithm 1. For a matrix [n, m]:

    M_t = b1 M_{t-1} + (1 - b1) G_t
    O_t = NS(M_t)                                       near U V^T of the singular value decomposition M_t = U S V^T
    v_t = b2 v_{t-1} + (1 - b2) mean_j O_t[:, j]^2      of every row [n]
    Y_t = O_t / (sqrt(v_t) + eps)                       row by row
    W_t = (1 - lr wd) W_{t-1} - 0.2 lr sqrt(n m) Y_t / |Y_t|

The authors' code looks ahead along the momentum and gives Y_t the norm of O_t; this is the algorithm of the paper.
With tensor parallelism NS, rows and norm are those of the whole matrix, whatever part of it a rank holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from collie_core.api import whole_of

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Muon: kellerjordan.github.io/posts/muon
RMS = 0.2  # of an update, in units of lr: about that of AdamW


def orthogonalized(matrix: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """The matrix [n, m] with singular values near 1, by Newton-Schulz in `dtype`; torch's Muon has bfloat16 alone."""
    a, b, c = COEFFICIENTS
    x = matrix.to(dtype)
    if tall := x.shape[0] > x.shape[1]:
        x = x.T
    x = x / x.norm().clamp(min=1e-7)  # no singular value is above 1
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def step_matrix(param: nn.Parameter, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    """One step in place; `param`, `grad`, `momentum` [n, m] and `row_squares` [n] are this rank's part of the whole."""
    precise, whole = torch.promote_types(param.dtype, torch.float32), whole_of(param)
    if not state:
        state["momentum"] = torch.zeros_like(param)
        state["row_squares"] = torch.zeros(len(param), dtype=precise, device=param.device)
    momentum, row_squares = state["momentum"], state["row_squares"]
    momentum.lerp_(grad, 1 - group["betas"][0])
    dtype = torch.bfloat16 if group["ns_dtype"] == "bfloat16" else precise
    update = orthogonalized(whole.gather(momentum), group["ns_steps"], dtype).to(precise)
    squares = update.square().mean(1, keepdim=True).expand_as(update)  # each entry has the mean of its whole row
    row_squares.lerp_(whole.take(squares)[:, 0], 1 - group["betas"][1])
    update = whole.take(update) / row_squares.sqrt().add_(group["eps"]).unsqueeze(1)
    norm = whole.sum(update.square().sum()).sqrt().clamp(min=group["eps"])
    param.mul_(1 - group["lr"] * group["weight_decay"])
    param.sub_(update * (group["lr"] * RMS * math.sqrt(whole.numel(param)) / norm))


def step_others(params: list[Any], grads: list[Any], states: list[dict[str, Tensor]], group: dict[str, Any]) -> None:
    """A step of AdamW, by torch."""
    for param, state in zip(params, states, strict=True):
        if not state:
            state["step"] = torch.zeros((), device=param.device)  # where the fused kernel reads it
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
    averages, squares, steps = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
    beta1, beta2 = group["adamw_betas"]
    rates = {"lr": group["lr"], "weight_decay": group["weight_decay"], "beta1": beta1, "beta2": beta2}
    options = {"eps": group["adamw_eps"], "amsgrad": False, "maximize": False, "fused": group["fused"]}
    adamw(params, grads, averages, squares, [], steps, **rates, **options)


class NorMuon(Optimizer):
    """NorMuon over groups with `role: hidden`, AdamW over the others.

    A group without a role is of matrices alone; with another parameter it raises a ValueError.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        ns_steps: int = 5,
        ns_dtype: Literal["float32", "bfloat16"] = "float32",
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
    ) -> None:
        hidden = {"role": "hidden", "betas": betas, "eps": eps, "ns_steps": ns_steps, "ns_dtype": ns_dtype}
        others = {"adamw_betas": adamw_betas, "adamw_eps": adamw_eps, "fused": True}  # where a restart puts `step`
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **hidden, **others})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See torch."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["role"] == "hidden" and any(param.ndim != 2 for param in group["params"]):
            raise ValueError("NorMuon is for matrices; put vectors and other tensors into a group with role='other'")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient. `closure` computes the loss again, with gradients."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            grads, states = [param.grad for param in params], [self.state[param] for param in params]
            if group["role"] != "hidden":
                step_others(params, grads, states, group)
                continue
            for param, grad, state in zip(params, grads, states, strict=True):
                step_matrix(param, grad, state, group)
        return loss
