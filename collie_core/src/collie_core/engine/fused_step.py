"""The step of an optimizer that updates each parameter in backward, as soon as its gradient is whole, and drops it.

No more than one whole gradient exists at a time (LOMO, arXiv 2306.09782). What needs all gradients before the first
update costs a second backward: clipping by the norm, and float16, whose overflows must not reach the weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from collie_core.compat import forget_gather_order
from collie_core.engine.deepspeed_step import start_engine
from collie_core.engine.norms import clip_coefficient, counts_here, norm_of_model
from collie_core.engine.state import HeldStates, ParameterStates
from collie_core.engine.step import (
    NOT_A_NUMBER,
    Around,
    LossFn,
    TrainFn,
    autocast,
    run_micro_batches,
    token_mean_loss,
)
from collie_core.engine.target_loss import Head
from collie_core.engine.zero3 import gathered_on_first
from collie_core.engine.zero_state import GatheredStates
from collie_core.errors import NotANumber, RunError
from collie_core.model.shard import install_gradient_hooks

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LRScheduler

    from collie_core.data.loader import Batch, StepBatch
    from collie_core.topology import Topology

NO_ACCUMULATION = (
    "an optimizer that updates in backward takes one micro-batch per step, and this one has {number}; "
    "set train.gradient_accumulation_steps=1"
)
DAMAGED = (
    "the gradient norm is {norm}, and the weights were updated with it in backward. Start again from the last good "
    "model, with train.max_grad_norm above 0: gradients are then looked at before the first update"
)


@dataclass
class LossScale:
    """Keeps float16 gradients in range, with the numbers of torch's GradScaler; 1 for other types."""

    active: bool
    value: float = 2.0**16
    good_steps: int = 0
    growth_steps: int = 2000

    @classmethod
    def of(cls, dtype: torch.dtype) -> LossScale:
        """For gradients of a type."""
        return cls(True) if dtype == torch.float16 else cls(False, 1.0)

    def update(self, *, overflow: bool) -> None:
        """After each step: half of it after an overflow, twice after many steps without one."""
        if not self.active:
            return
        self.good_steps = 0 if overflow else self.good_steps + 1
        if overflow:
            self.value /= 2
        elif self.good_steps == self.growth_steps:
            self.value, self.good_steps = self.value * 2, 0


class FusedStep:
    """Whole parameters on every data-parallel rank, in the precision they have."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        scheduler: LRScheduler,
        *,
        topology: Topology,
        dtype: torch.dtype,
        max_grad_norm: float | None,
        loss_fn: LossFn = token_mean_loss,
        train_fn: TrainFn | None = None,
        around: Around = lambda batch: nullcontext(),
    ) -> None:
        self._model = model
        self.optimizer = optimizer  # a `FusedOptimizer`
        self.scheduler = scheduler
        self.topology = topology
        self.dtype = dtype
        self.max_grad_norm = max_grad_norm
        self.loss_fn = loss_fn
        self.train_fn = train_fn
        self.around = around
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.states = self._states(model)
        self.device = topology.device
        self.scale = LossScale.of(dtype)
        self._norms: dict[nn.Parameter, Tensor] = {}  # of the gradients of this step
        self._norm = torch.zeros(())
        self._updating = True  # False: gradients are measured alone
        self._coefficient: Tensor | None = None
        install_gradient_hooks(model)  # before ours: they complete gradients
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(self._receive)
        self.head = Head.of(model)

    @property
    def model(self) -> nn.Module:
        """See `Step`."""
        return self._model

    @property
    def learning_rate(self) -> float:
        """See `Step`."""
        return float(self.scheduler.get_last_lr()[0])

    @property
    def two_passes(self) -> bool:
        """Whether all gradients are measured before the first update."""
        return bool(self.max_grad_norm) or self.scale.active

    def precision(self) -> AbstractContextManager[Any]:
        """Autocast over float32 weights; none where the weights themselves are of the run's precision."""
        whole = all(parameter.dtype == torch.float32 for parameter in self.parameters)
        return autocast(self.device, self.dtype) if whole else nullcontext()

    def forward_backward(self, batch: StepBatch, target_tokens: int) -> Tensor:
        """See `Step`; the parameters are updated when it returns.

        Raises:
            RunError: several micro-batches.
            NotANumber: the loss or a gradient is none, before anything was updated.
        """
        if len(batch.micro_batches) != 1:
            raise RunError(NO_ACCUMULATION.format(number=len(batch.micro_batches)))
        self._norms.clear()
        self._coefficient = None
        return self._pass(batch.on(self.device), target_tokens, self._backward)

    def update(self) -> float:
        """See `Step`: what is left to do after backward. A step whose float16 gradients overflowed was skipped.

        Raises:
            NotANumber: a gradient was none, and parameters were updated with it.
        """
        norm = float(self._norm)
        if not (math.isfinite(norm) or self.scale.active):
            raise NotANumber(DAMAGED.format(norm=norm), damaged=True)
        if math.isfinite(norm):
            self.optimizer.step()  # it finds no gradient; schedules want to see it called
            self.scheduler.step()
        self.scale.update(overflow=not math.isfinite(norm))
        return norm

    def discard(self) -> None:
        """See `Step`."""
        raise RunError("an optimizer that updates in backward has no gradients to forget")

    def loss_scale(self) -> dict[str, float]:
        """See `Step`."""
        return {"scale": self.scale.value, "good_steps": self.scale.good_steps} if self.scale.active else {}

    def set_loss_scale(self, found: Mapping[str, float]) -> None:
        """See `Step`."""
        if found and self.scale.active:
            self.scale.value, self.scale.good_steps = found["scale"], int(found["good_steps"])

    def gathered(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
        """See `Step`: they always are."""
        return nullcontext()

    def _states(self, model: nn.Module) -> ParameterStates:
        return HeldStates(model, self.optimizer)

    # -- the passes --------------------------------------------------------------------------------------------

    def _pass(self, batches: Sequence[Batch], target_tokens: int, backward: Any) -> Tensor:
        """One forward, and what `backward` does after it; returns the loss of the global batch."""
        total = run_micro_batches(self, batches, target_tokens, backward)
        if self.topology.dp.size > 1:
            dist.all_reduce(total, group=self.topology.dp.group)
        return total

    def _backward(self, batch: Batch, output: Tensor, gradient: Tensor | None, last: bool) -> None:
        if not self.two_passes:
            self._require_number(output)
            output.backward()
            self._norm = self._joined_norm()
            return
        self._measure(output * self.scale.value, retain_graph=True)
        if self._fit_to_apply():
            (output * self.scale.value).backward()

    def _measure(self, output: Tensor, *, retain_graph: bool) -> None:
        """A backward that keeps the norms of gradients and nothing else."""
        self._updating = False
        try:
            output.backward(retain_graph=retain_graph)
        finally:
            self._updating = True
        self._norm = self._joined_norm()

    def _fit_to_apply(self) -> bool:
        """Whether the measured gradients may reach the weights; False skips a float16 step that overflowed."""
        finite = bool(self._norm.isfinite())
        if not (finite or self.scale.active):
            raise NotANumber(NOT_A_NUMBER.format(norm=float(self._norm)))
        if self.max_grad_norm:
            self._coefficient = clip_coefficient(self._norm, self.max_grad_norm)
        return finite

    def _require_number(self, output: Tensor) -> None:
        """Stop all ranks before the first update when the loss of one is not a number."""
        loss = output.detach().clone()
        if self.topology.dp.size > 1:
            dist.all_reduce(loss, group=self.topology.dp.group)
        if not loss.isfinite():
            raise NotANumber(
                f"the loss is {float(loss)}: nothing was updated. Lower optimizer.lr or look at the samples"
            )

    def _joined_norm(self) -> Tensor:
        norms = [self._norms[p] for p in self.parameters if p in self._norms and counts_here(p, self.topology)]
        own = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), device=self.device)
        return norm_of_model(own, self.topology)

    # -- one gradient ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _receive(self, parameter: nn.Parameter) -> None:
        """Called in backward when the gradient of a parameter is whole: measure it, or use it; drop it."""
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        if self.topology.dp.size > 1:
            gradient = gradient.contiguous()
            dist.all_reduce(gradient, group=self.topology.dp.group)
        if self.scale.active:  # in float32, where dividing loses nothing
            gradient = gradient.float().div_(self.scale.value)
        if not (self._updating and self.two_passes):
            self._norms[parameter] = _norm(gradient)
        if not self._updating:
            return
        if self._coefficient is not None:
            gradient.mul_(self._coefficient)
        self._apply(parameter, gradient)

    def _apply(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        self.optimizer.update(parameter, gradient)


def _norm(gradient: Tensor) -> Tensor:
    """The L2 norm in float32, where the gradient is of float32 by the very function that the other steps call."""
    if gradient.dtype == torch.float32:
        norm: Tensor = nn.utils.get_total_norm([gradient])
        return norm
    coarse: Tensor = torch.linalg.vector_norm(gradient, dtype=torch.float32)
    return coarse


class Zero3FusedStep(FusedStep):
    """Parameters partitioned over the data-parallel ranks by DeepSpeed, whole while a layer needs them.

    A hook finds its parameter gathered: the whole is updated, on every rank alike, and each keeps its share.
    """

    def __init__(self, model: nn.Module, optimizer: Any, scheduler: LRScheduler, *, config: Any, **shared: Any) -> None:
        self.engine = start_engine(model, None, config, shared["topology"])
        super().__init__(self.engine.module, optimizer, scheduler, **shared)
        self.head = Head.of(self.engine.module, self._begin)
        self._has_begun = False

    def forward_backward(self, batch: StepBatch, target_tokens: int) -> Tensor:
        """See `FusedStep`."""
        if not self._has_begun:
            self._has_begun = True
            self._begin()
        try:
            return super().forward_backward(batch, target_tokens)
        finally:
            self._release()

    def _begin(self) -> None:
        """Training follows; what was before were forwards alone."""
        forget_gather_order(self.engine)

    def gathered(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
        """See `Step`."""
        return gathered_on_first(parameters, self.topology.dp, self.device)

    def _states(self, model: nn.Module) -> ParameterStates:
        return GatheredStates(model, self.optimizer, self.topology)

    def _pass(self, batches: Sequence[Batch], target_tokens: int, backward: Any) -> Tensor:
        """DeepSpeed gathers in the order of one forward and one backward, so measuring takes a forward of its own."""
        if not self.two_passes:
            return super()._pass(batches, target_tokens, backward)
        random_state = torch.random.get_rng_state()
        device_state = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        loss = super()._pass(batches, target_tokens, self._measure_only)
        self._release()
        if self._fit_to_apply():
            torch.random.set_rng_state(random_state)
            if device_state is not None:
                torch.cuda.set_rng_state(device_state, self.device)
            super()._pass(batches, target_tokens, self._update_only)
        return loss

    def _measure_only(self, batch: Batch, output: Tensor, gradient: Tensor | None, last: bool) -> None:
        self._measure(output * self.scale.value, retain_graph=False)

    def _update_only(self, batch: Batch, output: Tensor, gradient: Tensor | None, last: bool) -> None:
        (output * self.scale.value).backward()

    def _apply(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        super()._apply(parameter, gradient)
        share: Any = parameter.ds_tensor  # type: ignore[attr-defined]
        begin = self.topology.dp.rank * share.ds_numel
        end = min(begin + share.ds_numel, parameter.numel())
        if end > begin:
            share.data[: end - begin].copy_(parameter.data.flatten()[begin:end])

    def _release(self) -> None:
        """Parameters that are still whole would be stale in the next forward."""
        self.engine.optimizer.partition_all_parameters()
