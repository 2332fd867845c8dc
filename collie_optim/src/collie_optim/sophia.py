"""Sophia-G: momentum over a diagonal estimate of the curvature, clipped element by element.

Liu et al., "Sophia: A Scalable Stochastic Second-order Optimizer for Language Model Pre-training", arXiv 2305.14342,
Algorithm 3, with the Gauss-Newton-Bartlett estimator of Algorithm 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, overload

import torch
from torch import Tensor

from collie_optim.elementwise import ElementwiseOptimizer, check, with_gradient
from collie_optim.kernels import Row, Update


def sophia_update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    hessian: Tensor,
    *,
    lr: float,
    keep: float,
    one_minus_beta1: float,
    rho: float,
    eps: float,
) -> None:
    """A step of Algorithm 3, in place on `param` and `exp_avg`; `keep` is 1 - lr * weight_decay."""
    exp_avg.lerp_(grad, one_minus_beta1)  # m_t = b1 m_{t-1} + (1 - b1) g_t
    curvature = hessian.mul(rho).clamp_(min=eps)  # max(rho h_t, eps)
    update = torch.div(exp_avg, curvature).clamp_(min=-1, max=1)  # clip(m_t / ..., 1)
    param.mul_(keep).sub_(update.mul_(lr))  # theta_{t+1} = theta_t - lr wd theta_t - lr clip(...)


def sophia_update_all(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    hessians: list[Tensor],
    *,
    lr: float,
    keep: float,
    one_minus_beta1: float,
    rho: float,
    eps: float,
) -> None:
    """`sophia_update` for each tensor of the lists, which have one device and dtype, bit for bit."""
    torch._foreach_lerp_(exp_avgs, grads, one_minus_beta1)
    curvatures = torch._foreach_mul(hessians, rho)
    torch._foreach_clamp_min_(curvatures, eps)
    updates = torch._foreach_div(exp_avgs, curvatures)
    torch._foreach_clamp_min_(updates, -1)
    torch._foreach_clamp_max_(updates, 1)
    torch._foreach_mul_(updates, lr)
    torch._foreach_mul_(params, keep)
    torch._foreach_sub_(params, updates)


def estimate_update(hessian: Tensor, grad: Tensor, *, target_tokens: float, one_minus_beta2: float) -> None:
    """Algorithm 2, and the average of Algorithm 3, in place on `hessian`."""
    estimate = torch.mul(grad, grad).mul_(target_tokens)  # B g^2 of the mean loss over B drawn labels
    hessian.lerp_(estimate, one_minus_beta2)  # h_t = b2 h_{t-k} + (1 - b2) B g^2


def estimate_update_all(
    hessians: list[Tensor], grads: list[Tensor], *, target_tokens: float, one_minus_beta2: float
) -> None:
    """`estimate_update` for each tensor of the lists, which have one device and dtype, bit for bit."""
    squares = torch._foreach_mul(grads, grads)
    torch._foreach_mul_(squares, target_tokens)
    torch._foreach_lerp_(hessians, squares, one_minus_beta2)


SOPHIA = Update(sophia_update, sophia_update_all)
ESTIMATE = Update(estimate_update, estimate_update_all)


class Sophia(ElementwiseOptimizer):
    """Sophia-G as a torch optimizer, with two state tensors per parameter, `exp_avg` and `hessian`.

    The caller asks `curvature_due` before each step. When it is, the step begins with an estimate: gradients of the
    mean loss over labels that are drawn from the model's own distribution, and `step` inside `estimating`. Then follows
    the step itself, with the gradients of the true labels.

    This is the paper. The authors' code divides by rho * bs * h + 1e-15, where h averages g^2 without its factor B, and
    bs stands in for it as a constant 5120. Here h has the factor B of its own batch, so that the size of a batch may
    change; and eps is a lower bound, as in the paper.

    Args:
        params: parameters, or groups of them with options of their own.
        lr: the paper's eta.
        betas: shares that the averages of the gradient and of the curvature keep in an update.
        rho: the paper's gamma. The larger, the more elements are below the clip.
        weight_decay: the paper's lambda.
        eps: smallest divisor, for elements of no or negative curvature: these move by lr.
        hessian_interval: the paper's k: the curvature is due at the steps 1, 1 + k, 1 + 2k, ...
        kernel: see `ElementwiseOptimizer`.

    Raises:
        ValueError: an option is out of its range.
        RuntimeError: a gradient is sparse.
    """

    tensors: ClassVar[tuple[str, ...]] = ("exp_avg", "hessian")
    _target_tokens: int | None = None  # inside `estimating`

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.96, 0.99),
        rho: float = 0.05,
        weight_decay: float = 0.2,
        eps: float = 1e-12,
        hessian_interval: int = 10,
        kernel: str = "auto",
    ) -> None:
        check(rho > 0, f"rho={rho} must be more than 0")
        check(eps > 0, f"eps={eps} must be more than 0")
        check(hessian_interval > 0, f"hessian_interval={hessian_interval} must be at least 1")
        defaults = {
            "lr": lr,
            "betas": betas,
            "rho": rho,
            "weight_decay": weight_decay,
            "eps": eps,
            "hessian_interval": hessian_interval,
            "steps": 0,  # finished ones; in the group, so that a rank that holds no parameter counts too
        }
        super().__init__(params, defaults, kernel=kernel)

    def curvature_due(self) -> bool:
        """Whether an estimate comes before the next step: t mod k = 1, and always for k = 1. Alike on all ranks."""
        finished = max(group["steps"] for group in self.param_groups)
        return bool(finished % self.param_groups[0]["hessian_interval"] == 0)

    @contextmanager
    def estimating(self, target_tokens: int) -> Iterator[None]:
        """Inside, `step` updates the curvature alone, by h = beta2 h + (1 - beta2) * target_tokens * grad^2.

        Args:
            target_tokens: labels that the gradients are the mean over.

        Raises:
            ValueError: there is none.
        """
        check(target_tokens > 0, f"target_tokens={target_tokens} must be at least 1")
        self._target_tokens = target_tokens
        try:
            yield
        finally:
            self._target_tokens = None

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """See `ElementwiseOptimizer`, and `estimating`."""
        loss = super().step(closure)
        if self._target_tokens is None and not any(map(with_gradient, self.param_groups)):
            for group in self.param_groups:
                group["steps"] += 1
        return loss

    def rule(self, group: dict[str, Any], step: int) -> tuple[Update, dict[str, float]]:
        """See `ElementwiseOptimizer`."""
        beta1, beta2 = group["betas"]
        if self._target_tokens is not None:
            return ESTIMATE, {"target_tokens": float(self._target_tokens), "one_minus_beta2": 1 - beta2}
        return SOPHIA, {
            "lr": group["lr"],
            "keep": 1 - group["lr"] * group["weight_decay"],
            "one_minus_beta1": 1 - beta1,
            "rho": group["rho"],
            "eps": group["eps"],
        }

    def rows(self, params: Sequence[Tensor]) -> list[Row]:
        """See `ElementwiseOptimizer`. An estimate needs the gradient and the curvature alone."""
        rows = super().rows(params)
        return rows if self._target_tokens is None else [(hessian, grad) for _, grad, _, hessian in rows]

    def update_group(self, group: dict[str, Any], elements: int) -> None:
        """See `ElementwiseOptimizer`.

        A group is as far as the furthest of its parameters: ZeRO-3 calls `step` for one part of a group after another.
        """
        super().update_group(group, elements)
        if self._target_tokens is None:
            own = [int(self.state[param]["step"]) for param in with_gradient(group)]
            group["steps"] = max([group["steps"], *own])

    def finish(self, params: Sequence[Tensor]) -> None:
        """See `ElementwiseOptimizer`. An estimate is no step."""
        if self._target_tokens is None:
            super().finish(params)
