"""One optimizer step: forward, backward, clipping and update, behind one contract.

The loop asks a `Step` for these and nothing else, so that DeepSpeed, a pipeline schedule or an optimizer that fuses
its update into backward is a class here and no branch there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from collie_core.engine.norms import counts_here, norm_of_model
from collie_core.engine.pipeline import Backward, one_forward_one_backward
from collie_core.engine.state import HeldStates, ParameterStates
from collie_core.engine.target_loss import Head
from collie_core.errors import NotANumber
from collie_core.model.adapters import UNUSED
from collie_core.model.shard import Vocabulary, cross_entropy, install_gradient_hooks, sharded_logits, vocabulary_of
from collie_core.model.stages import lend, own_part, receive_gradients, return_gradients, stage_of

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from collie_core.data.loader import Batch, StepBatch
    from collie_core.engine.curvature import Relabel
    from collie_core.hookspecs import CurvatureOptimizer
    from collie_core.topology import Topology

NOT_A_NUMBER = (
    "the gradient norm is {norm}: the update was not applied. Lower optimizer.lr, lengthen the warm-up, "
    "or look for damaged samples"
)

LossFn = Callable[[Any, Tensor, int], Tensor]
"""(outputs, labels [B, L], target tokens of the global batch) -> this micro-batch's share of the loss, a scalar."""

TrainFn = Callable[[nn.Module, "Batch", int], Tensor]
"""(model, batch, target tokens of the global batch) -> this micro-batch's share of the loss, a scalar."""


Around = Callable[["Batch"], AbstractContextManager[Any]]
"""(micro-batch) -> a context for its forward, and again for its backward."""


class Step(Protocol):
    """What the loop needs of an engine."""

    @property
    def model(self) -> nn.Module:
        """The model as evaluation calls it."""

    @property
    def learning_rate(self) -> float:
        """Of the first parameter group, for the coming update."""

    @property
    def scheduler(self) -> LRScheduler:
        """The schedule."""

    @property
    def states(self) -> ParameterStates:
        """Weights and optimizer state, parameter by parameter, for checkpoints."""

    def loss_scale(self) -> dict[str, float]:
        """`scale` and `good_steps` since it was changed (float16 only), and what else the engine keeps of it."""

    def set_loss_scale(self, found: Mapping[str, float]) -> None:
        """Go on with what `loss_scale` gave, of this engine or another."""

    def forward_backward(self, batch: StepBatch, target_tokens: int) -> Tensor:
        """Accumulate gradients over the micro-batches; returns the loss of the global batch, a detached scalar."""

    def update(self) -> float:
        """Clip, update, advance the schedule and clear gradients; returns the gradient norm before clipping.

        Raises:
            NotANumber: a gradient is none; there are no gradients any more.
        """

    def discard(self) -> None:
        """Forget the gradients of the last `forward_backward`. Only plain torch, without ZeRO, can."""

    def precision(self) -> AbstractContextManager[Any]:
        """The autocast context of a forward pass."""

    def gathered(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
        """Inside, these parameters hold all that the first data-parallel rank has of them. Collective over those."""


class Engine(Step, Protocol):
    """What the steps of the core have beside: the functions that a program may replace."""

    loss_fn: LossFn
    train_fn: TrainFn | None
    around: Around
    head: Head | None  # in which the loss is made; None: the model gives logits


class Curvature(NamedTuple):
    """An optimizer that estimates curvature, and how the labels for it are drawn."""

    optimizer: CurvatureOptimizer
    relabel: Relabel


def token_mean_loss(outputs: Any, labels: Tensor, target_tokens: int, vocabulary: Vocabulary | None = None) -> Tensor:
    """Sum of the token losses of a micro-batch, divided by the targets of the whole global batch.

    `outputs.logits` [B, L, V] at a position predict the token after it; `labels` [B, L] hold targets at their own
    position and -100 elsewhere. The softmax is taken in float32. With `vocabulary` the logits are this rank's share
    of the vocabulary, and no rank holds the others'.
    """
    # Shifting the labels instead of the logits leaves the largest tensor of the step uncopied.
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)
    if vocabulary is not None:
        return cross_entropy(outputs.logits, targets, vocabulary).sum() / target_tokens
    logits = outputs.logits.flatten(0, 1).float()
    return F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="sum") / target_tokens


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Compute in `dtype` over float32 weights; a no-op in float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def stage_output(
    model: nn.Module,
    batch: Batch,
    hidden: Tensor | None,
    target_tokens: int,
    *,
    loss_fn: LossFn,
    train_fn: TrainFn | None,
    head: Head | None = None,
    relabel: Relabel | None = None,
) -> Tensor:
    """The share of one micro-batch in the loss of its global batch; before the last stage, its hidden states."""
    if train_fn is not None:
        return train_fn(model, batch, target_tokens)
    stage = stage_of(model)
    if stage is not None and not stage.is_last:
        return stage_forward(model, batch, hidden).logits  # type: ignore[no-any-return]
    if loss_fn is not token_mean_loss:
        outputs = stage_forward(model, batch, hidden)
        labels = batch.labels if relabel is None else relabel(outputs.logits, batch, None)
        return loss_fn(outputs, labels, target_tokens)
    if head is not None and relabel is None and _is_last(head, model, batch, hidden):
        with head.giving(partial(head.loss, batch=batch, target_tokens=target_tokens)):
            return stage_forward(model, batch, hidden).logits  # type: ignore[no-any-return]
    with sharded_logits(model):
        outputs = stage_forward(model, batch, hidden)
    vocabulary = vocabulary_of(model)
    labels = batch.labels if relabel is None else relabel(outputs.logits, batch, vocabulary)
    return token_mean_loss(outputs, labels, target_tokens, vocabulary)


def _is_last(head: Head, model: nn.Module, batch: Batch, hidden: Tensor | None) -> bool:
    """Whether the loss may be made in the head; the first time the model is asked by a forward."""
    if head.may_be_last and head.is_last is None:
        with head.asked() as answer:
            answer(stage_forward(model, batch, hidden).logits)
    return head.may_be_last


def stage_forward(model: nn.Module, batch: Batch, hidden: Tensor | None) -> Any:
    """The outputs of a whole model or of one stage, which takes `hidden` [B, L, H] unless it is the first."""
    inputs = batch.inputs()
    if hidden is not None:
        del inputs["input_ids"]
        inputs["inputs_embeds"] = hidden
    with own_part(model):
        outputs = model(**inputs, use_cache=False)
    if (unused := getattr(model, UNUSED, None)) is not None:  # for a stage without anything to train to have a backward
        outputs.logits = outputs.logits + 0.0 * unused.to(outputs.logits.dtype)
    return outputs


def run_micro_batches(
    step: Engine,
    batches: Sequence[Batch],
    target_tokens: int,
    backward: Backward,
    relabel: Relabel | None = None,
) -> Tensor:
    """Every micro-batch forward and backward; gradients add up. One after the other, or over the stages of a copy.

    With `relabel` the loss is that of other labels than the batch's own.

    Returns this rank's share of the loss, a detached scalar; 0 before the last stage.
    """
    total = torch.zeros((), device=batches[0].input_ids.device)

    def forward_around(batch: Batch, hidden: Tensor | None) -> Tensor:
        with step.around(batch), step.precision():
            functions: Any = {"loss_fn": step.loss_fn, "train_fn": step.train_fn, "head": step.head}
            output = stage_output(step.model, batch, hidden, target_tokens, relabel=relabel, **functions)
        if output.ndim == 0:
            total.add_(output.detach())
        return output

    def backward_around(batch: Batch, output: Tensor, gradient: Tensor | None, last: bool) -> None:
        with step.around(batch):
            backward(batch, output, gradient, last)

    stage = stage_of(step.model)
    if stage is not None:
        one_forward_one_backward(stage, step.model, batches, forward_around, backward_around)
        return total
    for number, batch in enumerate(batches):
        backward_around(batch, forward_around(batch, None), None, number == len(batches) - 1)
    return total


def loss_of_copy(total: Tensor, topology: Topology) -> Tensor:
    """The loss, which the last stage of each copy has, on every stage."""
    if topology.pp.size > 1:
        dist.broadcast(total, topology.pp.ranks[-1], group=topology.pp.group)
    return total


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
        around: Around = lambda batch: nullcontext(),
        curvature: Curvature | None = None,
    ) -> None:
        self._model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.topology = topology
        self.dtype = dtype
        self.max_grad_norm = max_grad_norm
        self.loss_fn = loss_fn
        self.train_fn = train_fn
        self.around = around
        self.curvature = curvature
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.states: ParameterStates = HeldStates(model, optimizer)
        self.device = self.parameters[0].device
        # float16 has too small a range for gradients; the scaler keeps them in it, and grows back after an overflow.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        self.scaler.scale(torch.zeros((), device=self.device))  # it starts with its first loss, which one stage has
        install_gradient_hooks(model)
        self.head = Head.of(model)

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
        batches = batch.on(self.device)
        if self.curvature is not None and self.curvature.optimizer.curvature_due():
            self._estimate(self.curvature, batches, target_tokens)
        return loss_of_copy(self._gradients(batches, target_tokens), self.topology)

    def _estimate(self, curvature: Curvature, batches: Sequence[Batch], target_tokens: int) -> None:
        """One more forward and backward, for the optimizer's estimate; an overflow in float16 leaves that as it is."""
        self._gradients(batches, target_tokens, curvature.relabel)
        self._share_overflow()
        self.scaler.unscale_(self.optimizer)
        with curvature.optimizer.estimating(target_tokens):
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def _gradients(self, batches: Sequence[Batch], target_tokens: int, relabel: Relabel | None = None) -> Tensor:
        """Gradients of the global batch; returns the loss on the last stage."""
        total = run_micro_batches(self, batches, target_tokens, self._backward, relabel)
        return_gradients(self._model)
        self._sum_over_data(total)
        return total

    def _backward(self, batch: Batch, output: Tensor, gradient: Tensor | None, last: bool) -> None:
        if gradient is None:
            self.scaler.scale(output).backward()
            return
        output.backward(gradient)
        for lent, its_gradient in receive_gradients(self._model) if last else ():
            lent.backward(its_gradient)

    def update(self) -> float:
        """See `Step`. A step whose float16 gradients overflowed is skipped; its norm is returned as it is.

        Raises:
            NotANumber: a gradient is none; nothing was updated.
        """
        self._share_overflow()
        self.scaler.unscale_(self.optimizer)
        norm = self._grad_norm()
        if not (self.scaler.is_enabled() or norm.isfinite()):
            self.discard()
            raise NotANumber(NOT_A_NUMBER.format(norm=float(norm)))
        if self.max_grad_norm:
            nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() >= scale:  # not skipped
            self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        lend(self._model)
        return float(norm)

    def discard(self) -> None:
        """See `Step`."""
        self.optimizer.zero_grad(set_to_none=True)

    def loss_scale(self) -> dict[str, float]:
        """See `Step`."""
        if not self.scaler.is_enabled():
            return {}
        found = self.scaler.state_dict()
        return {"scale": found["scale"], "good_steps": found["_growth_tracker"]}

    def set_loss_scale(self, found: Mapping[str, float]) -> None:
        """See `Step`."""
        if found and self.scaler.is_enabled():
            own = {"scale": found["scale"], "_growth_tracker": int(found["good_steps"])}
            self.scaler.load_state_dict(self.scaler.state_dict() | own)

    def gathered(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
        """See `Step`: they always do."""
        return nullcontext()

    def _grad_norm(self) -> Tensor:
        gradients = [p.grad for p in self.parameters if p.grad is not None and counts_here(p, self.topology)]
        return norm_of_model(nn.utils.get_total_norm(gradients), self.topology)

    def _share_overflow(self) -> None:
        """An overflow in one part of the model must skip the update of every part (float16 only)."""
        if not self.scaler.is_enabled() or self.topology.model.size == 1:
            return
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        found = torch.stack([gradient.isfinite().all().logical_not() for gradient in gradients]).any().float()
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.topology.model.group)
        if found.item() > 0:
            gradients[0].fill_(math.inf)

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
