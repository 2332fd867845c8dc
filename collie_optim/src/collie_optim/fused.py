"""What optimizers share that update in backward: LOMO and AdaLomo."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class FusedBase(Optimizer, ABC):
    """A `collie_core.api.FusedOptimizer`. It is an ordinary torch optimizer too: `step()` uses the `.grad` of every
    parameter, so the same update can be had without fusing.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See torch. Remembers which group a parameter is in."""
        super().add_param_group(param_group)
        if not hasattr(self, "_groups"):
            self._groups: dict[Tensor, int] = {}
        number = len(self.param_groups) - 1
        self._groups |= dict.fromkeys(self.param_groups[-1]["params"], number)

    @torch.no_grad()
    def update(self, param: nn.Parameter, grad: Tensor) -> None:
        """Update one parameter in place. `grad` has its shape, in its precision or float32, and may be overwritten.

        Raises:
            RuntimeError: the gradient is sparse.
        """
        if grad.is_sparse:
            raise RuntimeError(f"{type(self).__name__} needs dense gradients; an embedding with sparse=True has others")
        group = self.param_groups[self._groups[param]]
        if group["clip_grad_value"] is not None:
            grad.clamp_(-group["clip_grad_value"], group["clip_grad_value"])
        self._update(param, grad, group)

    @abstractmethod
    def _update(self, param: nn.Parameter, grad: Tensor, group: dict[str, Any]) -> None:
        """Update one parameter with the options of its group."""

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient. `closure` computes the loss again, with gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self.update(param, param.grad)
        return loss


def require_at_least_0(**options: float | None) -> None:
    """Refuse options that are negative.

    Raises:
        ValueError: names the option.
    """
    for name, value in options.items():
        if value is not None and not value >= 0:
            raise ValueError(f"{name}={value} must be at least 0")
