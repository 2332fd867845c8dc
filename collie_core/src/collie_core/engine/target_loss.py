"""The loss of the targets alone: positions without one never reach the head, and logits exist for a few at a time.

A head that is a plain linear layer over the last hidden states is taken out of the model's forward, and its product,
the softmax and both gradients are computed together, chunk by chunk. What would be logits [B, L, V] in float32, and
their gradient, becomes [chunk, V]. Another head, or a model that does more with its logits, computes them as ever.

Shapes: B rows, L positions, N targets, H hidden entries, V entries of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from collie_core.data.loader import IGNORE

if TYPE_CHECKING:
    from collie_core.data.loader import Batch

CHUNK = 1 << 24  # logits at a time: 64 MiB in float32


class Head:
    """A plain linear layer that gives a model its logits, and of which the loss takes the weights.

    Whether a model gives out what its head gives, and does nothing more with it, its first forward tells.
    """

    def __init__(self, module: nn.Linear) -> None:
        self.module = module
        self._is_last: bool | None = None  # None: not known yet
        self._given: list[Tensor] = []
        self._restore: list[Callable[[], object]] = []  # random numbers to where they were before the first forward

    @classmethod
    def of(cls, model: Any) -> Head | None:
        """That of a whole model or of its last stage; None: it is of another kind, or ZeRO-3 has taken it apart."""
        find = getattr(model, "get_output_embeddings", None)
        head = find() if callable(find) else None
        return cls(head) if type(head) is nn.Linear and not hasattr(head.weight, "ds_id") else None

    @property
    def may_be_left_out(self) -> bool:
        """Not if the model does more with its logits, or somebody looks at them."""
        return self._is_last is not False and not (self.module._forward_hooks or self.module._forward_pre_hooks)

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Inside, the head gives what it gets."""
        device = self.module.weight.device
        if self._is_last is None:
            self._restore = [partial(torch.set_rng_state, torch.get_rng_state())]
            if device.type == "cuda":
                self._restore.append(partial(torch.cuda.set_rng_state, torch.cuda.get_rng_state(device), device))
        self._given = []

        def forward(hidden: Tensor) -> Tensor:
            self._given.append(hidden)
            return hidden

        self.module.forward = forward  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            del self.module.forward

    def was_last(self, logits: Tensor) -> bool:
        """Whether what the model gave is what the head gave, which got [B, L, H]. If not, a forward with it follows."""
        given, self._given = self._given, []
        if self._is_last is None:
            self._is_last = len(given) == 1 and logits is given[0]
            if not self._is_last:  # the forward that follows draws the same random numbers
                for restore in self._restore:
                    restore()
        return self._is_last


def target_loss(hidden: Tensor, head: nn.Linear, batch: Batch, target_tokens: int) -> Tensor:
    """See `token_mean_loss`; `hidden` [B, L, H] is what the head would get."""
    targets = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORE).flatten()
    hidden = hidden.flatten(0, 1)
    if batch.targets is not None:
        targets, hidden = targets[batch.targets], hidden[batch.targets]
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        hidden = hidden.to(torch.get_autocast_dtype(kind))
    with torch.autocast(kind, enabled=False):
        total = _SumOfLosses.apply(hidden, head.weight, head.bias, targets)  # type: ignore[no-untyped-call]
    return cast(Tensor, total) / target_tokens


class _SumOfLosses(Function):
    """The sum of the cross-entropies of `targets` [N] under softmax(hidden weight^T + bias), in float32.

    Gradients are made with the loss, since softmax minus target is all that they take of the logits.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        for_hidden, for_weight, for_bias, _ = ctx.needs_input_grad
        matrix = weight.to(hidden.dtype)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradients = [
            torch.zeros_like(hidden) if for_hidden else None,
            torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if for_weight else None,
            torch.zeros(bias.shape, dtype=torch.float32, device=bias.device) if bias is not None and for_bias else None,
        ]
        step = max(1, CHUNK // len(weight))
        for begin in range(0, len(hidden), step):
            rows, wanted = hidden[begin : begin + step], targets[begin : begin + step]
            counted = wanted != IGNORE
            logits = F.linear(rows, matrix, None if bias is None else bias.to(hidden.dtype)).float()  # [chunk, V]
            place = wanted.masked_fill(~counted, 0)[:, None]
            normalizer = logits.logsumexp(-1, keepdim=True)
            loss += (normalizer - logits.gather(-1, place)).squeeze(-1).masked_fill(~counted, 0.0).sum()
            if not (for_hidden or for_weight or for_bias):
                continue
            difference = logits.sub_(normalizer).exp_()  # the softmax, in the place of the logits
            difference.scatter_add_(-1, place, difference.new_full((), -1.0).expand_as(place))
            difference.mul_(counted[:, None])
            if gradients[2] is not None:
                gradients[2] += difference.sum(0)
            difference = difference.to(hidden.dtype)
            if gradients[0] is not None:
                torch.mm(difference, matrix, out=gradients[0][begin : begin + step])
            if gradients[1] is not None:
                _add_product(gradients[1], difference.T, rows)
        ctx.save_for_backward(*gradients)
        ctx.kinds = weight.dtype, None if bias is None else bias.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        # Not in place: an optimizer that measures gradients first goes through here twice.
        for_hidden, for_weight, for_bias = ctx.saved_tensors
        kind, kind_of_bias = ctx.kinds
        return (
            None if for_hidden is None else (for_hidden * gradient).to(for_hidden.dtype),
            None if for_weight is None else (for_weight * gradient).to(kind),
            None if for_bias is None else (for_bias * gradient).to(kind_of_bias),
            None,
        )


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left right, in float32."""
    if right.dtype == torch.float32:
        total.addmm_(left, right)
    else:
        total += left @ right
