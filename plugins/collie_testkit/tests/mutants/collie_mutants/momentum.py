"""Gradient descent with momentum, which is right, and what is wrong in one way each."""

import os
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from collie_core.api import whole_of


class Momentum(Optimizer):
    """m <- 0.9 m + g, w <- (1 - lr wd) w - lr m."""

    momentum = 0.9

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-2, weight_decay: float = 0.0, momentum: float | None = None
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.momentum = self.momentum if momentum is None else momentum

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self.change(param, param.grad, group)

    def change(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        param.mul_(1 - group["lr"] * group["weight_decay"])
        param.sub_(group["lr"] * self.direction(param, grad))

    def direction(self, param: Tensor, grad: Tensor) -> Tensor:
        found: Tensor = self.state[param].setdefault("momentum", torch.zeros_like(param))
        return found.mul_(self.momentum).add_(grad)


class Incomplete(Momentum):
    def __init__(self, params: Iterable[Any], lr: float = 1e-2) -> None:
        super().__init__(params, lr)


class Wordless(Momentum):
    def __init__(self, params: Iterable[Any], rate_of: Any = None, **options: Any) -> None:
        super().__init__(params, **options)


class SecretUpdate(Momentum):
    def update(self, param: nn.Parameter, grad: Tensor) -> None:
        self.change(param, grad, self.param_groups[0])


class Noisy(Momentum):
    def direction(self, param: Tensor, grad: Tensor) -> Tensor:
        return super().direction(param, grad) + 1e-3 * random.random()


class DecaysUnused(Momentum):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    param.mul_(1 - group["lr"] * group["weight_decay"])


class OneRate(Momentum):
    def change(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        super().change(param, grad, self.param_groups[0])


class KeepsRate(Momentum):
    def change(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        group.setdefault("first_lr", group["lr"])
        super().change(param, grad, group | {"lr": group["first_lr"]})


class Forgets(Momentum):
    def __init__(self, params: Iterable[Any], **options: Any) -> None:
        super().__init__(params, **options)
        self.memory: dict[Tensor, Tensor] = {}

    def direction(self, param: Tensor, grad: Tensor) -> Tensor:
        found = self.memory.setdefault(param, torch.zeros_like(param))
        return found.mul_(0.9).add_(grad)


class Greedy(Momentum):
    def direction(self, param: Tensor, grad: Tensor) -> Tensor:
        self.state[param]["last_grad"] = grad.clone()
        return super().direction(param, grad)


class Brittle(Momentum):
    def direction(self, param: Tensor, grad: Tensor) -> Tensor:
        return super().direction(param, grad / grad.norm())


class Coarse(Momentum):
    def direction(self, param: Tensor, grad: Tensor) -> Tensor:
        found = super().direction(param, grad)
        return found.bfloat16().float() if found.dtype == torch.float32 else found


class OtherMomentum(Momentum):
    momentum = 0.8


class AfterCare(Momentum):
    """Updates in backward, and once more after it."""

    def __init__(self, params: Iterable[Any], **options: Any) -> None:
        super().__init__(params, **options)
        self.updated: list[Tensor] = []

    @torch.no_grad()
    def update(self, param: nn.Parameter, grad: Tensor) -> None:
        self.change(param, grad, self.group_of(param))
        self.updated.append(param)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for param in self.updated:
            param.mul_(1 - 0.1 * self.group_of(param)["lr"])
        self.updated.clear()

    def group_of(self, param: Tensor) -> dict[str, Any]:
        return next(group for group in self.param_groups if any(param is member for member in group["params"]))


class EagerToMove(Momentum):
    """Estimates at every fifth step, and moves a little by what was drawn."""

    estimates = False

    def curvature_due(self) -> bool:
        return bool(self.param_groups[0].setdefault("count", 0) % 5 == 0)

    @contextmanager
    def estimating(self, target_tokens: int) -> Iterator[None]:
        self.estimates = True
        yield
        self.estimates = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        if not self.estimates:
            super().step()
            self.param_groups[0]["count"] = self.param_groups[0].get("count", 0) + 1
            return
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.sub_(0.01 * group["lr"] * param.grad)


class Ascends(Momentum):
    def direction(self, param: Tensor, grad: Tensor) -> Tensor:
        return -super().direction(param, grad)


class Ranked(Momentum):
    def direction(self, param: Tensor, grad: Tensor) -> Tensor:
        return super().direction(param, grad) * (1 + int(os.environ.get("RANK", "0")))


class OwnShare(Momentum):
    """The norm of the part that a rank has."""

    def direction(self, param: Tensor, grad: Tensor) -> Tensor:
        return super().direction(param, grad / grad.norm().clamp(min=1e-12))


class CountsParameters(Momentum):
    """On a pipeline stage there are fewer."""

    def direction(self, param: Tensor, grad: Tensor) -> Tensor:
        return super().direction(param, grad) / sum(len(group["params"]) for group in self.param_groups)


class Flattened(Momentum):
    """The norm of the whole parameter, which a flat slice of many no longer is; it does not declare that."""

    def direction(self, param: Tensor, grad: Tensor) -> Tensor:
        assert isinstance(param, nn.Parameter)
        norm = whole_of(param).sum(grad.float().square().sum()).sqrt()
        return super().direction(param, grad / norm.clamp(min=1e-12).to(grad.dtype))


class Misfiled(Momentum):
    """Its state has not the shape of the parameter, so that no other topology can cut it."""

    def direction(self, param: Tensor, grad: Tensor) -> Tensor:
        flat: Tensor = self.state[param].setdefault("momentum", param.new_zeros(param.numel()))
        return flat.mul_(0.9).add_(grad.reshape(-1)).view(param.shape)


class StaysOnCpu(Momentum):
    def direction(self, param: Tensor, grad: Tensor) -> Tensor:
        found: Tensor = self.state[param].setdefault("momentum", torch.zeros(param.shape, dtype=param.dtype))
        return found.mul_(0.9).add_(grad.cpu()).to(grad.device)
