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
    """A plain linear layer that gives a model its logits, and in whose forward the loss is made in their place.

    Whether a model gives out what its head gives, and does nothing more with it, a forward without gradients tells.
    With ZeRO-3 the weights are whole while the head runs, and at no other time.

    Args:
        module: the layer.
        told: called after that forward.
    """

    def __init__(self, module: nn.Linear, told: Callable[[], object] = lambda: None) -> None:
        self.module = module
        self._told = told
        self.is_last: bool | None = None  # None: not known yet
        self._room = torch.empty(0, module.out_features)

    @classmethod
    def of(cls, model: Any, told: Callable[[], object] = lambda: None) -> Head | None:
        """That of a whole model or of its last stage; None: it is of another kind."""
        find = getattr(model, "get_output_embeddings", None)
        head = find() if callable(find) else None
        return cls(head, told) if type(head) is nn.Linear else None

    @property
    def may_be_last(self) -> bool:
        """Not if the model does more with its logits, or somebody looks at them."""
        return self.is_last is not False and all(map(_of_deepspeed, self._hooks()))

    @contextmanager
    def asked(self) -> Iterator[Callable[[Tensor], None]]:
        """Inside, a forward makes neither logits nor gradients. What the model gave is handed to the function."""
        device, given = self.module.weight.device, list[Tensor]()

        def answer(logits: Tensor) -> None:
            self.is_last = len(given) == 1 and _place(logits) == _place(given[0])

        handle = self.module.register_forward_hook(lambda module, inputs, output: given.append(output))
        random_state = torch.random.fork_rng([device] if device.type == "cuda" else [])
        try:
            with random_state, torch.no_grad(), self.giving(lambda hidden: hidden):
                yield answer
        finally:
            handle.remove()
        self._told()

    @contextmanager
    def giving(self, instead: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Inside, the head gives what `instead` makes of its input, hidden states [B, L, H]."""
        self.module.forward = instead  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            del self.module.forward

    def loss(self, hidden: Tensor, batch: Batch, target_tokens: int) -> Tensor:
        """See `token_mean_loss`; `hidden` [B, L, H] is what the head gets."""
        targets = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORE).flatten()
        hidden = hidden.flatten(0, 1)
        if batch.targets is not None:
            targets, hidden = targets[batch.targets], hidden[batch.targets]
        kind = hidden.device.type
        if torch.is_autocast_enabled(kind):
            hidden = hidden.to(torch.get_autocast_dtype(kind))
        weight, bias = self.module.weight, self.module.bias
        with torch.autocast(kind, enabled=False):
            total = _SumOfLosses.apply(hidden, weight, bias, targets, self._scratch)  # type: ignore[no-untyped-call]
        return cast(Tensor, total) / target_tokens

    def _scratch(self, rows: int) -> Tensor:
        """Room for logits [rows, V] in float32. It is kept, for the system takes its time to hand out as much anew."""
        device = self.module.weight.device
        if len(self._room) < rows or self._room.device != device:
            self._room = torch.empty(rows, self.module.out_features, dtype=torch.float32, device=device)
        return self._room[:rows]

    def _hooks(self) -> list[Callable[..., Any]]:
        return [*self.module._forward_pre_hooks.values(), *self.module._forward_hooks.values()]


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Where its values lie: ZeRO-3 makes another tensor of the same values at the end of every module."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride()


def _of_deepspeed(hook: Callable[..., Any]) -> bool:
    """ZeRO-3 gathers weights in hooks, which do not look at what a module gives."""
    return str(getattr(hook, "__module__", "")).startswith("deepspeed.")


class _SumOfLosses(Function):
    """The sum of the cross-entropies of `targets` [N] under softmax(hidden weight^T + bias), in float32.

    Gradients are made with the loss, since softmax minus target is all that they take of the logits.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scratch: Callable[[int], Tensor]
    ) -> Tensor:
        for_hidden, for_weight, for_bias, *_ = ctx.needs_input_grad
        matrix, shift = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        # The first chunk fills them.
        new = partial(torch.empty if len(hidden) else torch.zeros, device=hidden.device)
        gradients = [
            new(hidden.shape, dtype=hidden.dtype) if for_hidden else None,
            new(weight.shape, dtype=torch.float32) if for_weight else None,
            new(bias.shape, dtype=torch.float32) if bias is not None and for_bias else None,
        ]
        for begin, end in _chunks(len(hidden), max(1, CHUNK // len(weight))):
            rows, wanted = hidden[begin:end], targets[begin:end]
            counted = wanted != IGNORE
            logits = _linear(rows, matrix, shift, scratch(len(rows)))  # [chunk, V]
            place = wanted.masked_fill(~counted, 0)[:, None]
            largest, of_target = logits.amax(-1, keepdim=True), logits.gather(-1, place)
            # In the place of the logits, row by row. Its largest entry is 1 / sum(exp(logit - largest)).
            softmax = torch.softmax(logits, -1, out=logits)
            losses = largest - of_target - softmax.amax(-1, keepdim=True).log()
            loss += losses.squeeze(-1).masked_fill(~counted, 0.0).sum()
            if not (for_hidden or for_weight or for_bias):
                continue
            softmax.scatter_add_(-1, place, softmax.new_full((), -1.0).expand_as(place))
            difference = softmax.to(hidden.dtype)
            # What does not count is left out of the products, which are narrower than [chunk, V].
            keep = counted.to(hidden.dtype)[:, None]
            if gradients[0] is not None:
                torch.mm(difference, matrix, out=gradients[0][begin:end]).mul_(keep)
            if gradients[1] is not None:
                _add_product(gradients[1], difference.T, rows * keep, first=begin == 0)
            if gradients[2] is not None:
                _add_product(gradients[2][:, None], softmax.T, counted.float()[:, None], first=begin == 0)
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
            None,
        )


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """rows weight^T + bias into `out`, which is float32."""
    if rows.dtype != out.dtype:
        return out.copy_(F.linear(rows, weight, bias))
    if bias is None:
        return torch.mm(rows, weight.T, out=out)
    return torch.addmm(bias, rows, weight.T, out=out)


def _chunks(rows: int, most: int) -> list[tuple[int, int]]:
    """(first, end) of the fewest pieces of at most `most` rows, about equally long."""
    number = -(-rows // most)
    ends = [rows * place // number for place in range(1, number + 1)]
    return list(zip([0, *ends], ends, strict=False))


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """total += left right, in float32; the first one goes in the place of what is there."""
    if right.dtype == torch.float32:
        total.addmm_(left, right, beta=0 if first else 1)
    elif first:
        total.copy_(left @ right)
    else:
        total += left @ right
