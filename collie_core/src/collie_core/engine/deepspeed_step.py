"""The step through DeepSpeed's engine: ZeRO stages 1 to 3, float32 master weights below float32."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from collie_core.compat import deepspeed_start, forget_gather_order
from collie_core.engine.ranks import Ranks, start_deepspeed
from collie_core.engine.step import (
    NOT_A_NUMBER,
    Around,
    Curvature,
    LossFn,
    TrainFn,
    loss_of_copy,
    run_micro_batches,
    token_mean_loss,
)
from collie_core.engine.target_loss import Head
from collie_core.engine.zero3 import gathered_on_first
from collie_core.engine.zero_state import zero_states
from collie_core.errors import NotANumber, RunError
from collie_core.model.shard import install_gradient_hooks
from collie_core.model.stages import lend, receive_gradients, return_gradients

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from collie_core.data.loader import Batch, StepBatch
    from collie_core.topology import Topology


class DeepSpeedStep:
    """Holds the engine. DeepSpeed averages gradients over ranks, so each share is scaled by their number."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        *,
        config: dict[str, Any],
        topology: Topology,
        loss_fn: LossFn = token_mean_loss,
        train_fn: TrainFn | None = None,
        around: Around = lambda batch: nullcontext(),
        curvature: Curvature | None = None,
    ) -> None:
        self.stage = int(config["zero_optimization"]["stage"])
        self.states = zero_states(model, optimizer, topology, self.stage)
        self.engine = start_engine(model, optimizer, config, topology)
        self.states.take_over(self.engine)
        self.scheduler = scheduler
        self.topology = topology
        self.loss_fn = loss_fn
        self.train_fn = train_fn
        self.around = around
        self.curvature = curvature
        install_gradient_hooks(model)
        self.head = Head.of(model, self._begin)
        self._has_begun = False
        lend(model)  # in the precision of the engine

    @property
    def model(self) -> nn.Module:
        """The engine: calling it gathers partitioned weights as needed."""
        return self.engine  # type: ignore[no-any-return]

    @property
    def learning_rate(self) -> float:
        """See `Step`."""
        return float(self.scheduler.get_last_lr()[0])

    def precision(self) -> AbstractContextManager[Any]:
        """No autocast: the engine holds the weights in the run's dtype."""
        return nullcontext()

    def forward_backward(self, batch: StepBatch, target_tokens: int) -> Tensor:
        """See `Step`."""
        if not self._has_begun:
            self._has_begun = True
            self._begin()
        batches = batch.on(self.engine.device)
        if self.curvature is not None and self.curvature.optimizer.curvature_due():
            self._estimate(self.curvature, batches, target_tokens)
        total = run_micro_batches(self, batches, target_tokens, self._backward)
        return_gradients(self.engine.module)
        if self.topology.dp.size > 1:
            dist.all_reduce(total, group=self.topology.dp.group)
        return loss_of_copy(total, self.topology)

    def _begin(self) -> None:
        """Training follows; what was before were forwards alone."""
        if self.stage == 3:
            forget_gather_order(self.engine)

    def _estimate(self, curvature: Curvature, batches: Sequence[Batch], target_tokens: int) -> None:
        """One more forward and backward, whose gradients reach the optimizer partitioned, as any others do."""
        run_micro_batches(self, batches, target_tokens, self._backward, curvature.relabel)
        return_gradients(self.engine.module)
        clipping, self.engine.optimizer.clip_grad = self.engine.optimizer.clip_grad, 0.0
        with curvature.optimizer.estimating(target_tokens):
            self.engine.step()
        self.engine.optimizer.clip_grad = clipping

    def _backward(self, batch: Batch, output: Tensor, gradient: Tensor | None, last: bool) -> None:
        if self.engine.managed_gradient_accumulation():
            self.engine.set_gradient_accumulation_boundary(last)
        if gradient is None:
            self.engine.backward(output * self.topology.dp.size)
            return
        # DeepSpeed starts from a scalar; the gradient of this one by the output is the gradient that came.
        scale = self.engine.optimizer.loss_scale if self.engine.fp16_enabled() else 1.0  # which it multiplies in again
        scalar = (output.float() * (gradient.float() / scale)).sum()
        for lent, its_gradient in receive_gradients(self.engine.module) if last else ():
            scalar = scalar + (lent.float() * (its_gradient.float() / scale)).sum()
        self.engine.backward(scalar)

    def update(self) -> float:
        """See `Step`. An overflow in float16 skips the update and lowers the loss scale.

        Raises:
            NotANumber: a gradient is none; nothing was updated.
        """
        self.engine.step()
        reported = self.engine.get_global_grad_norm()
        norm = math.nan if reported is None else float(reported)
        if self.engine.was_step_applied():
            self.scheduler.step()
        elif not self.engine.fp16_enabled():
            raise NotANumber(NOT_A_NUMBER.format(norm=norm))
        lend(self.engine.module)
        return norm

    def discard(self) -> None:
        """See `Step`."""
        raise RunError("DeepSpeed cannot forget gradients")

    def loss_scale(self) -> dict[str, float]:
        """See `Step`."""
        scaler = self.engine.optimizer.loss_scaler
        if not (self.engine.fp16_enabled() and scaler.dynamic):
            return {}
        good_steps = scaler.cur_iter - scaler.last_overflow_iter - 1
        return {"scale": scaler.cur_scale, "good_steps": good_steps, "hysteresis": scaler.cur_hysteresis}

    def set_loss_scale(self, found: Mapping[str, float]) -> None:
        """See `Step`."""
        scaler = self.engine.optimizer.loss_scaler
        if found and self.engine.fp16_enabled() and scaler.dynamic:
            scaler.cur_scale, scaler.cur_iter = found["scale"], int(found["good_steps"])
            scaler.last_overflow_iter = -1
            scaler.cur_hysteresis = int(found.get("hysteresis", scaler.delayed_shift))

    def gathered(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
        """See `Step`."""
        if self.stage < 3:
            return nullcontext()
        return gathered_on_first(parameters, self.topology.dp, self.engine.device)


def start_engine(model: nn.Module, optimizer: Optimizer | None, config: dict[str, Any], topology: Topology) -> Any:
    """DeepSpeed's engine around a model. Without an optimizer it does nothing but gather and partition parameters."""
    start_deepspeed(topology)
    import deepspeed
    from deepspeed.utils import groups

    # Without one, norms take no exchange over the parts of a copy. DeepSpeed remembers the last it was given.
    groups.mpu = Ranks(topology) if topology.model.size > 1 else None
    with deepspeed_start(topology.local_rank), _buffers_kept(model):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, mpu=groups.mpu)
    return engine


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """DeepSpeed casts buffers with the weights; rope's frequencies need the precision they were made in."""
    kept = [(module, name, buffer) for module in model.modules() for name, buffer in module._buffers.items()]
    yield
    for module, name, buffer in kept:
        cast_one = module._buffers[name]
        if buffer is not None and cast_one is not None and buffer.dtype == torch.float32:
            module._buffers[name] = buffer.to(cast_one.device)
