"""LOMO: gradient descent whose update is part of backward, so that there are neither gradients nor states to hold.

Lv et al., "Full Parameter Fine-tuning for Large Language Models with Limited Resources", arXiv 2306.09782, Algorithm 1.
Weight decay is not in the paper. It is decoupled here, as in the authors' code, and off unless asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from collie_optim.fused import FusedBase, require_at_least_0
from collie_optim.kernels import blocks, entries_at_a_time


def lomo_update(param: Tensor, grad: Tensor, *, lr: float, weight_decay: float) -> None:
    """One step, in place on `param`; both tensors have one shape. theta_t = theta_{t-1} - lr (g_t + wd theta_{t-1})"""
    if weight_decay:
        param.mul_(1 - lr * weight_decay)
    param.add_(grad, alpha=-lr)


def lomo_update_coarse(param: Tensor, grad: Tensor, *, lr: float, weight_decay: float) -> None:
    """The same for a parameter below float32: computed in float32, block by block, and rounded once."""
    for part, part_grad in blocks([(param, grad)], entries_at_a_time(param.device)):
        fine = part.float()
        lomo_update(fine, part_grad.float(), lr=lr, weight_decay=weight_decay)
        part.copy_(fine)


class Lomo(FusedBase):
    """LOMO as a torch optimizer that `collie_core` calls in backward.

    Clipping by the gradient norm is `train.max_grad_norm` of the run, which takes a second backward pass, as in the
    paper (Section 3.3); `clip_grad_value` bounds each entry and takes none.

    Raises:
        ValueError: an option is out of its range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-2,
        weight_decay: float = 0.0,
        clip_grad_value: float | None = None,
    ) -> None:
        require_at_least_0(lr=lr, weight_decay=weight_decay, clip_grad_value=clip_grad_value)
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "clip_grad_value": clip_grad_value})

    def _update(self, param: nn.Parameter, grad: Tensor, group: dict[str, Any]) -> None:
        update = lomo_update if param.dtype.itemsize >= 4 else lomo_update_coarse
        update(param, grad, lr=group["lr"], weight_decay=group["weight_decay"])
