"""Adan: Nesterov momentum, from the gradient and its change since the last step.

Xie et al., "Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing Deep Models", arXiv 2208.06677,
Algorithm 1. The betas here are those of the authors' code, 1 minus the paper's: near 1, as everywhere else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from collie_optim.elementwise import ElementwiseOptimizer, check
from collie_optim.kernels import Update

VARIANTS = ("authors", "paper")


def adan_update(
    param: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    n: Tensor,
    previous: Tensor,
    *,
    new_m: float,
    new_v: float,
    new_n: float,
    beta2: float,
    keep: float,
    lr_m: float,
    lr_v: float,
    scale_n: float,
    eps: float,
) -> None:
    """One step, in place on all but `grad`. `previous` is the gradient of the step before.

    `new_m`, `new_v` and `new_n` are the shares of the new values in the averages, 1 - beta but for the first steps.
    `keep`, `lr_m`, `lr_v` and `scale_n` hold learning rate, decay and bias corrections; see `Adan.rule`.
    """
    change = grad - previous  # g_t - g_{t-1}
    m.lerp_(grad, new_m)  # m_t = b1 m_{t-1} + (1 - b1) g_t
    v.lerp_(change, new_v)  # v_t = b2 v_{t-1} + (1 - b2) (g_t - g_{t-1})
    ahead = change.mul_(beta2).add_(grad)  # g_t + b2 (g_t - g_{t-1})
    n.lerp_(ahead.mul_(ahead), new_n)  # n_t = b3 n_{t-1} + (1 - b3) [...]^2
    denominator = n.sqrt().mul_(scale_n).add_(eps)
    update = m.mul(lr_m).add_(v.mul(lr_v)).div_(denominator)  # lr (m_t + b2 v_t) / (sqrt(n_t) + eps)
    param.mul_(keep).sub_(update)
    previous.copy_(grad)


def adan_update_all(
    params: list[Tensor],
    grads: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    n: list[Tensor],
    previous: list[Tensor],
    *,
    new_m: float,
    new_v: float,
    new_n: float,
    beta2: float,
    keep: float,
    lr_m: float,
    lr_v: float,
    scale_n: float,
    eps: float,
) -> None:
    """`adan_update` for each tensor of the lists, which have one device and dtype, bit for bit."""
    changes = torch._foreach_sub(grads, previous)
    torch._foreach_lerp_(m, grads, new_m)
    torch._foreach_lerp_(v, changes, new_v)
    torch._foreach_mul_(changes, beta2)
    torch._foreach_add_(changes, grads)
    torch._foreach_mul_(changes, changes)
    torch._foreach_lerp_(n, changes, new_n)
    denominators = torch._foreach_sqrt(n)
    torch._foreach_mul_(denominators, scale_n)
    torch._foreach_add_(denominators, eps)
    updates = torch._foreach_mul(m, lr_m)
    torch._foreach_add_(updates, torch._foreach_mul(v, lr_v))
    torch._foreach_div_(updates, denominators)
    torch._foreach_mul_(params, keep)
    torch._foreach_sub_(params, updates)
    torch._foreach_copy_(previous, grads)


ADAN = Update(adan_update, adan_update_all)


class Adan(ElementwiseOptimizer):
    """Adan as a torch optimizer, with the state of 4 float32 numbers per weight, 16 bytes.

    These are the averages m, v and n (`exp_avg`, `exp_avg_diff`, `exp_avg_sq`), and the previous gradient. The three
    alone, 12 bytes, are not enough: v averages g_t - g_{t-1}, no average holds g_{t-1} itself, and the next backward
    pass overwrites the gradient.

    The authors' code clips gradients by their global norm. That is left out on purpose: `train.max_grad_norm` does the
    same over the whole model, whatever part of it this process holds.

    Args:
        params: parameters, or groups of them with options of their own.
        lr: the paper's eta.
        betas: 1 minus the paper's beta_1, beta_2, beta_3.
        weight_decay: the paper's lambda.
        eps: added to the square root of n.
        proximal: theta = (theta - update) / (1 + lr * weight_decay), as in the paper; False: theta is multiplied by
            1 - lr * weight_decay before the update, as AdamW does and the authors' code with `no_prox`.
        variant: "authors": averages start at 0 and their bias is corrected, as in Adam. "paper": as in Algorithm 1 the
            first m is g, the first n is g^2, the first v that is not 0 is the first change; nothing is corrected.
        restart_steps: start all averages anew after so many steps; None: never. The paper restarts on a condition with
            an unknown radius R, and the authors' code when it is called (as `restart` here).
        kernel: see `ElementwiseOptimizer`.

    Raises:
        ValueError: an option is out of its range.
        RuntimeError: a gradient is sparse.
    """

    tensors: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_diff", "exp_avg_sq", "previous_grad")

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        weight_decay: float = 0.02,
        eps: float = 1e-8,
        proximal: bool = True,
        variant: str = "authors",
        restart_steps: int | None = None,
        kernel: str = "auto",
    ) -> None:
        check(eps > 0, f"eps={eps} must be more than 0")  # n is 0 where no gradient came yet
        check(variant in VARIANTS, f"variant={variant!r} must be one of {', '.join(VARIANTS)}")
        check(restart_steps is None or restart_steps > 0, f"restart_steps={restart_steps} must be at least 1")
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "eps": eps,
            "proximal": proximal,
            "variant": variant,
            "restart_steps": restart_steps,
        }
        super().__init__(params, defaults, kernel=kernel)

    @torch.no_grad()
    def restart(self) -> None:
        """Let the averages of every parameter start anew with the next step."""
        for state in self.state.values():
            _forget(state)

    def prepare(self, group: dict[str, Any], param: Tensor) -> None:
        """See `ElementwiseOptimizer`."""
        super().prepare(group, param)
        state = self.state[param]
        if group["restart_steps"] is not None and state["step"] >= group["restart_steps"]:
            _forget(state)
        if state["step"] == 0:
            state["previous_grad"].copy_(param.grad)  # so the first change is 0

    def rule(self, group: dict[str, Any], step: int) -> tuple[Update, dict[str, float]]:
        """See `ElementwiseOptimizer`."""
        beta1, beta2, beta3 = group["betas"]
        lr, decay = group["lr"], group["lr"] * group["weight_decay"]
        as_in_paper = group["variant"] == "paper"
        # In the paper m and n begin with the first step; v with the second, since the first change is 0.
        first_m, first_v = as_in_paper and step == 1, as_in_paper and step <= 2
        bias1, bias2, bias3 = (1.0 if as_in_paper else 1 - beta**step for beta in (beta1, beta2, beta3))
        # (theta - update) / (1 + decay) = keep * theta - keep * update
        keep = 1 / (1 + decay) if group["proximal"] else 1 - decay
        lr = lr * keep if group["proximal"] else lr
        return ADAN, {
            "new_m": 1.0 if first_m else 1 - beta1,
            "new_v": 1.0 if first_v else 1 - beta2,
            "new_n": 1.0 if first_m else 1 - beta3,
            "beta2": beta2,
            "keep": keep,
            "lr_m": lr / bias1,
            "lr_v": lr * beta2 / bias2,
            "scale_n": 1 / math.sqrt(bias3),
            "eps": group["eps"],
        }


def _forget(state: dict[str, Any]) -> None:
    for tensor in state.values():
        tensor.zero_()
