"""Lion: the sign of an interpolated momentum.

Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675, Algorithm 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer


def lion_update(
    param: Tensor,
    grad: Tensor,
    momentum: Tensor,
    *,
    lr: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
) -> None:
    """One step of Algorithm 2, in place on `param` and `momentum`; all three tensors have one shape."""
    direction = torch.lerp(momentum, grad, 1 - beta1).sign_()  # c_t = b1 m_{t-1} + (1 - b1) g_t; sign(c_t)
    param.mul_(1 - lr * weight_decay)  # p_t = p_{t-1} - lr (sign(c_t) + wd p_{t-1}), decay first
    param.add_(direction, alpha=-lr)
    momentum.lerp_(grad, 1 - beta2)  # m_t = b2 m_{t-1} + (1 - b2) g_t


def lion_update_all(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    *,
    lr: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
) -> None:
    """`lion_update` for each (param, grad, momentum), bit for bit, in one kernel launch per line on a GPU.

    The tensors lie on one device and have one dtype.
    """
    directions = torch._foreach_lerp(momenta, grads, 1 - beta1)
    torch._foreach_sign_(directions)
    torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_add_(params, directions, alpha=-lr)
    torch._foreach_lerp_(momenta, grads, 1 - beta2)


class Lion(Optimizer):
    """Lion as a torch optimizer, with one state tensor `exp_avg` per parameter.

    Raises:
        ValueError: an option is out of its range.
        RuntimeError: a gradient is sparse.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        if lr < 0:  # 0 is legal: a warm-up starts there
            raise ValueError(f"lr={lr} must be at least 0")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={betas} must each be at least 0 and less than 1")
        if weight_decay < 0:
            raise ValueError(f"weight_decay={weight_decay} must be at least 0")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient. `closure` computes the loss again, with gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        for params in _by_device_and_dtype([p for p in group["params"] if p.grad is not None]):
            lion_update_all(
                params,
                [param.grad for param in params if param.grad is not None],
                [self._momentum(param) for param in params],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                beta1=beta1,
                beta2=beta2,
            )

    def _momentum(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(param)  # m_0 = 0
        momentum: Tensor = state["exp_avg"]
        return momentum


def _by_device_and_dtype(params: list[Tensor]) -> Iterable[list[Tensor]]:
    buckets: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for param in params:
        if param.grad is not None and param.grad.is_sparse:
            raise RuntimeError("Lion needs dense gradients; an embedding with sparse=True gives sparse ones")
        buckets.setdefault((param.device, param.dtype), []).append(param)
    return buckets.values()
