"""Lion: the sign of an interpolated momentum.

Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675, Algorithm 2.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from collie_optim.elementwise import ElementwiseOptimizer
from collie_optim.kernels import Update


def lion_update(
    param: Tensor,
    grad: Tensor,
    momentum: Tensor,
    *,
    lr: float,
    keep: float,
    one_minus_beta1: float,
    one_minus_beta2: float,
) -> None:
    """One step of Algorithm 2, in place on `param` and `momentum`; `keep` is 1 - lr * weight_decay."""
    direction = torch.lerp(momentum, grad, one_minus_beta1).sign_()  # c_t = b1 m_{t-1} + (1 - b1) g_t; sign(c_t)
    param.mul_(keep).sub_(direction.mul_(lr))  # p_t = p_{t-1} - lr (sign(c_t) + wd p_{t-1}), decay first
    momentum.lerp_(grad, one_minus_beta2)  # m_t = b2 m_{t-1} + (1 - b2) g_t


def lion_update_all(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    *,
    lr: float,
    keep: float,
    one_minus_beta1: float,
    one_minus_beta2: float,
) -> None:
    """`lion_update` for each (param, grad, momentum) of one device and dtype, bit for bit."""
    directions = torch._foreach_lerp(momenta, grads, one_minus_beta1)
    torch._foreach_sign_(directions)
    torch._foreach_mul_(directions, lr)
    torch._foreach_mul_(params, keep)
    torch._foreach_sub_(params, directions)
    torch._foreach_lerp_(momenta, grads, one_minus_beta2)


LION = Update(lion_update, lion_update_all)


class Lion(ElementwiseOptimizer):
    """Lion as a torch optimizer, with one state tensor `exp_avg` per parameter.

    Raises:
        ValueError: an option is out of its range.
        RuntimeError: a gradient is sparse.
    """

    tensors: ClassVar[tuple[str, ...]] = ("exp_avg",)
    counts_steps: ClassVar[bool] = False

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        kernel: str = "auto",
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, kernel=kernel)

    def rule(self, group: dict[str, Any], step: int) -> tuple[Update, dict[str, float]]:
        """See `ElementwiseOptimizer`."""
        beta1, beta2 = group["betas"]
        return LION, {
            "lr": group["lr"],
            "keep": 1 - group["lr"] * group["weight_decay"],
            "one_minus_beta1": 1 - beta1,
            "one_minus_beta2": 1 - beta2,
        }
