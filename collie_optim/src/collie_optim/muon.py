"""Muon: orthogonal updates for the matrices of hidden layers, AdamW for everything else.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024 (kellerjordan.github.io/posts/muon); for
decay and the scale `match_rms_adamw`: Liu et al., "Muon is Scalable for LLM Training", arXiv 2502.16982. For a matrix:

    m_t = b m_{t-1} + (1 - b) g_t
    u_t = b m_t + (1 - b) g_t           (nesterov; else m_t)
    theta_t = (1 - lr wd) theta_{t-1} - lr s O(u_t)

O(u), by `orthogonalized`, is near the U V^T of the singular value decomposition u = U S V^T. The scale s is
sqrt(max(1, n / m)) for a matrix [n, m], or 0.2 sqrt(max(n, m)), which gives updates the size of AdamW's.

With tensor parallelism the matrix that is orthogonalized is the whole one, whatever part of it a rank holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from collie_core.api import Whole, whole_of
from collie_optim.fused import require_at_least_0
from collie_optim.kernels import CPU

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # chosen by Jordan for a steep slope at 0


def orthogonalized(matrix: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """The matrix [n, m] with singular values near 1, by Newton-Schulz iterations of a quintic, computed in `dtype`."""
    a, b, c = COEFFICIENTS
    x = matrix.to(dtype, copy=True)
    if tall := x.shape[0] > x.shape[1]:
        x = x.T
    x = x.div_(x.norm().clamp(min=1e-7))  # no singular value is above 1
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def muon_update(
    param: Tensor,
    grad: Tensor,
    momentum: Tensor,
    *,
    lr: float,
    weight_decay: float,
    beta: float,
    nesterov: bool,
    steps: int,
    scale: str,
    dtype: torch.dtype,
    whole: Whole,
) -> None:
    """One step, in place on `param` and `momentum`. All have the shape of this rank's part of the matrix."""
    momentum.lerp_(grad, 1 - beta)
    direction = grad.lerp(momentum, beta) if nesterov else momentum
    update = whole.take(orthogonalized(whole.gather(direction), steps, dtype))
    param.mul_(1 - lr * weight_decay)
    param.add_(update, alpha=-lr * _scale(scale, *whole.shape(param)))


def _scale(name: str, rows: int, cols: int) -> float:
    return math.sqrt(max(1, rows / cols)) if name == "original" else 0.2 * math.sqrt(max(rows, cols))


def _precision(name: str, param: Tensor) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if param.device != CPU else torch.promote_types(param.dtype, torch.float32)
    return torch.bfloat16 if name == "bfloat16" else torch.float32


class Muon(Optimizer):
    """Muon over groups with `role: hidden`, AdamW over the others. A group without a role is of matrices alone.

    State of a hidden matrix: `momentum`; of the rest `step`, `exp_avg` and `exp_avg_sq`.

    Args:
        ns_steps: iterations of Newton-Schulz.
        ns_dtype: their precision; auto: bfloat16 on a GPU, float32 on a CPU, where topologies then agree to rounding.
        scale: see above.
        adamw_lr, adamw_betas, adamw_eps: of the other parameters, which share `weight_decay`.

    Raises:
        ValueError: an option is out of its range, or a group without a role has a parameter that is no matrix.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 2e-2,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        ns_dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        scale: Literal["original", "match_rms_adamw"] = "original",
        adamw_lr: float = 3e-4,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
    ) -> None:
        require_at_least_0(lr=lr, weight_decay=weight_decay, adamw_lr=adamw_lr, adamw_eps=adamw_eps)
        if not all(0 <= beta < 1 for beta in (momentum, *adamw_betas)):
            raise ValueError(f"{momentum=} and {adamw_betas=} must be at least 0 and less than 1")
        if scale not in ("original", "match_rms_adamw"):
            raise ValueError(f"scale={scale!r} must be original or match_rms_adamw")
        self._adamw_lr = adamw_lr
        options = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "ns_dtype": ns_dtype}
        others = {"betas": adamw_betas, "eps": adamw_eps, "fused": True}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "scale": scale, **options, **others})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See torch. A group that is not of hidden matrices gets the learning rate of AdamW unless it has one."""
        role = param_group.setdefault("role", "hidden")
        if role != "hidden":
            param_group.setdefault("lr", self._adamw_lr)
        super().add_param_group(param_group)
        if role == "hidden" and any(param.ndim != 2 for param in self.param_groups[-1]["params"]):
            raise ValueError("Muon is for matrices; put vectors and other tensors into a group with role='other'")

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient. `closure` computes the loss again, with gradients.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if any(param.grad.is_sparse for param in params):
                raise RuntimeError("Muon needs dense gradients; an embedding with sparse=True gives sparse ones")
            if group["role"] == "hidden":
                for param in params:
                    self._step_matrix(param, group)
            elif params:
                self._step_others(params, group)
        return loss

    def _step_matrix(self, param: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[param]
        if not state:
            state["momentum"] = torch.zeros_like(param)
        assert param.grad is not None
        muon_update(
            param,
            param.grad,
            state["momentum"],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            beta=group["momentum"],
            nesterov=group["nesterov"],
            steps=group["ns_steps"],
            scale=group["scale"],
            dtype=_precision(group["ns_dtype"], param),
            whole=whole_of(param),
        )

    def _step_others(self, params: list[nn.Parameter], group: dict[str, Any]) -> None:
        states = [self.state[param] for param in params]
        for param, state in zip(params, states, strict=True):
            if not state:
                state["step"] = torch.zeros((), device=param.device)  # where the fused kernel reads it
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
        beta1, beta2 = group["betas"]
        adamw(
            params,  # type: ignore[arg-type]
            [param.grad for param in params if param.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=group["fused"],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
