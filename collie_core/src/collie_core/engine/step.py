"""One optimizer step: forward, backward, clipping and update, behind one contract.

The loop asks a `Step` for these and nothing else, so that DeepSpeed, a pipeline schedule or an optimizer that fuses
its update into backward is a class here and no branch there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from collie_core.errors import RunError

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from collie_core.data.loader import Batch, StepBatch
    from collie_core.topology import Topology

NOT_A_NUMBER = (
    "the gradient norm is {norm}: the update was not applied. Lower optimizer.lr, lengthen the warm-up, "
    "or look for damaged samples"
)

LossFn = Callable[[Any, Tensor, int], Tensor]
"""(outputs, labels [B, L], target tokens of the global batch) -> this micro-batch's share of the loss, a scalar."""

TrainFn = Callable[[nn.Module, "Batch", int], Tensor]
"""(model, batch, target tokens of the global batch) -> this micro-batch's share of the loss, a scalar."""


class Step(Protocol):
    """What the loop needs of an engine."""

    @property
    def model(self) -> nn.Module:
        """The model as evaluation calls it."""

    @property
    def learning_rate(self) -> float:
        """Of the first parameter group, for the coming update."""

    def forward_backward(self, batch: StepBatch, target_tokens: int) -> Tensor:
        """Accumulate gradients over the micro-batches; returns the loss of the global batch, a detached scalar."""

    def update(self) -> float:
        """Clip, update, advance the schedule and clear gradients; returns the gradient norm before clipping."""

    def precision(self) -> AbstractContextManager[Any]:
        """The autocast context of a forward pass."""

    def state_dict(self) -> Mapping[str, Tensor]:
        """The weights of the whole model under its own names, on the main rank. Collective."""

    def gathered(self) -> AbstractContextManager[Any]:
        """Inside, the trainable weights stand whole in the model. Collective."""


def token_mean_loss(outputs: Any, labels: Tensor, target_tokens: int) -> Tensor:
    """Sum of the token losses of a micro-batch, divided by the targets of the whole global batch.

    `outputs.logits` [B, L, V] at a position predict the token after it; `labels` [B, L] hold targets at their own
    position and -100 elsewhere. The softmax is taken in float32.
    """
    logits = outputs.logits
    # Shifting the labels instead of the logits leaves the largest tensor of the step uncopied.
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum")
    return losses / target_tokens


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Compute in `dtype` over float32 weights; a no-op in float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def micro_batch_loss(
    model: nn.Module, batch: Batch, target_tokens: int, *, loss_fn: LossFn, train_fn: TrainFn | None
) -> Tensor:
    """The share of one micro-batch in the loss of its global batch."""
    if train_fn is not None:
        return train_fn(model, batch, target_tokens)
    return loss_fn(model(**batch.inputs(), use_cache=False), batch.labels, target_tokens)


class TorchStep:
    """Plain torch: float32 weights, autocast below that, gradients summed over data-parallel ranks."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        *,
        topology: Topology,
        dtype: torch.dtype,
        max_grad_norm: float | None,
        loss_fn: LossFn = token_mean_loss,
        train_fn: TrainFn | None = None,
    ) -> None:
        self._model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.topology = topology
        self.dtype = dtype
        self.max_grad_norm = max_grad_norm
        self.loss_fn = loss_fn
        self.train_fn = train_fn
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.device = self.parameters[0].device
        # float16 has too small a range for gradients; the scaler keeps them in it, and grows back after an overflow.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)

    @property
    def model(self) -> nn.Module:
        """See `Step`."""
        return self._model

    @property
    def learning_rate(self) -> float:
        """See `Step`."""
        return float(self.scheduler.get_last_lr()[0])

    def precision(self) -> AbstractContextManager[Any]:
        """See `Step`."""
        return autocast(self.device, self.dtype)

    def forward_backward(self, batch: StepBatch, target_tokens: int) -> Tensor:
        """See `Step`."""
        total = torch.zeros((), device=self.device)
        for micro_batch in batch.micro_batches:
            with self.precision():
                loss = micro_batch_loss(
                    self._model,
                    micro_batch.to(self.device),
                    target_tokens,
                    loss_fn=self.loss_fn,
                    train_fn=self.train_fn,
                )
            self.scaler.scale(loss).backward()
            total += loss.detach()
        self._sum_over_data(total)
        return total

    def update(self) -> float:
        """See `Step`. A step whose float16 gradients overflowed is skipped; its norm is returned as it is.

        Raises:
            RunError: a gradient is not a number; nothing was updated.
        """
        self.scaler.unscale_(self.optimizer)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if not (self.scaler.is_enabled() or norm.isfinite()):
            raise RunError(NOT_A_NUMBER.format(norm=float(norm)))
        if self.max_grad_norm:
            nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() >= scale:  # not skipped
            self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def state_dict(self) -> Mapping[str, Tensor]:
        """See `Step`."""
        return self._model.state_dict()

    def gathered(self) -> AbstractContextManager[Any]:
        """See `Step`: they always do."""
        return nullcontext()

    def _sum_over_data(self, loss: Tensor) -> None:
        """Every rank's gradients and loss become those of the global batch."""
        if self.topology.dp.size == 1:
            return
        for parameter in self.parameters:
            if parameter.grad is None:  # every rank must bring the same tensors
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients] + [loss.flatten().to(gradients[0].dtype)])
        dist.all_reduce(flat, group=self.topology.dp.group)
        offset = 0
        for tensor in [*gradients, loss]:
            tensor.copy_(flat[offset : offset + tensor.numel()].view_as(tensor))
            offset += tensor.numel()
