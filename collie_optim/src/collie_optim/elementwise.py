"""What the element-wise optimizers share: everything but the update itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from collie_optim.kernels import Row, Update, apply

KERNELS = ("auto", "eager", "compiled")


class ElementwiseOptimizer(Optimizer):
    """An optimizer whose update of a weight reads nothing but that weight, its gradient and its state.

    So it gives the same on a whole tensor, on a tensor-parallel part, and on the flat slice that ZeRO hands out. A
    subclass names its state tensors and says in `rule` how a step updates them. A parameter without a gradient is
    skipped: neither its weights nor its state change, and its own count of steps stays.

    Args:
        params: parameters, or groups of them with options of their own.
        defaults: the options that groups may have, with the values for groups that do not.
        kernel: how the update runs; see `kernels.apply`. Belongs to the process, so it is not in the `state_dict`.

    Raises:
        ValueError: an option is out of its range.
        RuntimeError: a gradient is sparse.
    """

    tensors: ClassVar[tuple[str, ...]] = ()  # state of the shape and dtype of the parameter, 0 at the start
    counts_steps: ClassVar[bool] = True  # whether `rule` needs the number of the step

    def __init__(
        self, params: Iterable[Tensor] | Iterable[dict[str, Any]], defaults: dict[str, Any], *, kernel: str
    ) -> None:
        check(kernel in KERNELS, f"kernel={kernel!r} must be one of {', '.join(KERNELS)}")
        check(defaults["lr"] >= 0, f"lr={defaults['lr']} must be at least 0")  # 0 is legal: a warm-up starts there
        betas = defaults["betas"]
        check(all(0 <= beta < 1 for beta in betas), f"betas={betas} must each be at least 0 and less than 1")
        check(defaults["weight_decay"] >= 0, f"weight_decay={defaults['weight_decay']} must be at least 0")
        super().__init__(params, defaults)
        self.kernel = kernel

    def rule(self, group: dict[str, Any], step: int) -> tuple[Update, dict[str, float]]:
        """The update and its coefficients, with the options of `group`. `step` counts from 1 for each parameter, and is
        always 1 without `counts_steps`.
        """
        raise NotImplementedError

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
        elements = sum(param.numel() for group in self.param_groups for param in with_gradient(group))
        for group in self.param_groups:
            self.update_group(group, elements)
        return loss

    def update_group(self, group: dict[str, Any], elements: int) -> None:
        """Update the parameters of a group; `elements` are those of all groups."""
        alike: dict[tuple[torch.device, torch.dtype, int], list[Tensor]] = {}
        for param in with_gradient(group):
            self.prepare(group, param)
            step = int(self.state[param]["step"]) + 1 if self.counts_steps else 1
            alike.setdefault((param.device, param.dtype, step), []).append(param)
        for (_, _, step), params in alike.items():
            update, coefficients = self.rule(group, step)
            apply(update, self.rows(params), coefficients, kernel=self.kernel, elements=elements)
            self.finish(params)

    def prepare(self, group: dict[str, Any], param: Tensor) -> None:
        """Make the state of a parameter, before its first update."""
        state = self.state[param]
        if state:
            return
        if self.counts_steps:
            state["step"] = torch.tensor(0.0)  # float32 on the CPU, as torch's own optimizers count
        for name in self.tensors:
            state[name] = torch.zeros_like(param)

    def finish(self, params: Sequence[Tensor]) -> None:
        """Count the step of parameters that were updated."""
        if self.counts_steps:
            for param in params:
                self.state[param]["step"] += 1

    def rows(self, params: Sequence[Tensor]) -> list[Row]:
        """What the update is given of each parameter."""
        return [
            (param, param.grad, *(self.state[param][name] for name in self.tensors))
            for param in params
            if param.grad is not None
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "kernel": self.kernel}  # torch copies and pickles its own attributes only


def with_gradient(group: dict[str, Any]) -> list[Tensor]:
    """The parameters of a group that have a gradient.

    Raises:
        RuntimeError: it is sparse.
    """
    params: list[Tensor] = [param for param in group["params"] if param.grad is not None]
    if any(param.grad is not None and param.grad.is_sparse for param in params):
        raise RuntimeError("this optimizer needs dense gradients; an embedding with sparse=True gives sparse ones")
    return params


def check(holds: bool, message: str) -> None:
    """Raise ValueError with `message` unless `holds`."""
    if not holds:
        raise ValueError(message)
