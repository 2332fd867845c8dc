"""The schedule of micro-batches over the stages of a pipeline.

Every rank of a copy reads the same micro-batches, so each stage knows their shapes, positions and labels, and only
hidden states [B, L, H] and their gradients travel. One forward, one backward (1F1B; PipeDream-Flush,
arXiv 2006.09503): a stage holds the activations of at most `stages - its number` micro-batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from collie_core.model.stages import Stage, stage_of, wire_dtype

if TYPE_CHECKING:
    from collie_core.data.loader import Batch

Forward = Callable[["Batch", Tensor | None], Tensor]
"""(micro-batch, hidden states before this stage or None) -> those after it, or on the last stage its loss."""

Backward = Callable[["Batch", Tensor, Tensor | None, bool], None]
"""(micro-batch, what forward gave, its gradient or None for a loss, whether it is the last one of the step)."""


def one_forward_one_backward(
    stage: Stage, model: nn.Module, batches: Sequence[Batch], forward: Forward, backward: Backward
) -> None:
    """Run every micro-batch forward and backward over the stages of a copy; gradients add up. Collective over them."""
    _Schedule(stage, model, batches, forward, backward).run()


def forward_only(model: nn.Module, batches: Iterator[Batch], forward: Forward) -> Iterator[tuple[Batch, Tensor | None]]:
    """Each batch with what the last stage gives for it; None on the other stages. Collective as above."""
    stage = stage_of(model)
    if stage is None:
        for batch in batches:
            yield batch, forward(batch, None)
        return
    wire = _Wire(stage, model)
    for batch in batches:
        hidden = wire.exchange(receive=wire.before(batch))
        output = forward(batch, hidden)
        wire.exchange(send=wire.after(output))
        yield batch, output if stage.is_last else None


class _Schedule:
    """1F1B of one stage."""

    def __init__(
        self, stage: Stage, model: nn.Module, batches: Sequence[Batch], forward: Forward, backward: Backward
    ) -> None:
        self.stage = stage
        self.wire = _Wire(stage, model)
        self.batches = batches
        self.forward = forward
        self.backward = backward
        self.coming = deque(batches)  # forward still to do
        self.open: deque[tuple[Batch, Tensor | None, Tensor]] = deque()  # forward done: batch, input, output

    def run(self) -> None:
        """Fill the pipeline, alternate, empty it."""
        wire = self.wire
        ahead = min(self.stage.axis.size - 1 - self.stage.axis.rank, len(self.batches))
        for _ in range(ahead):
            hidden = wire.exchange(receive=wire.before(self.coming[0]))
            wire.exchange(send=wire.after(self._forward(hidden)))
        if self.coming:
            hidden = wire.exchange(receive=wire.before(self.coming[0]))
        while self.coming:
            output = self._forward(hidden)
            # Both ways in one exchange: the neighbour is sending us a gradient at the same moment.
            gradient = wire.exchange(send=wire.after(output), receive=wire.gradient_after(self.open[0][0]))
            upstream = self._backward(gradient)
            if self.coming:
                hidden = wire.exchange(send=upstream, receive=wire.before(self.coming[0]))
            else:
                wire.exchange(send=upstream)
        while self.open:
            gradient = wire.exchange(receive=wire.gradient_after(self.open[0][0]))
            wire.exchange(send=self._backward(gradient))

    def _forward(self, hidden: Tensor | None) -> Tensor:
        batch = self.coming.popleft()
        if hidden is not None:
            hidden.requires_grad_()
        output = self.forward(batch, hidden)
        self.open.append((batch, hidden, output))
        return output

    def _backward(self, gradient: Tensor | None) -> _Message | None:
        """The oldest open micro-batch; returns the gradient for the stage before."""
        batch, hidden, output = self.open.popleft()
        self.backward(batch, output, gradient, not self.coming and not self.open)
        return None if hidden is None else self.wire.gradient_before(hidden)


_Message = tuple[Tensor, int]  # and the rank at its other end


class _Wire:
    """What goes over the boundaries of a stage. The first has none before it, the last none after it."""

    def __init__(self, stage: Stage, model: nn.Module) -> None:
        ranks, own = stage.axis.ranks, stage.axis.rank
        self.previous = None if stage.is_first else ranks[own - 1]
        self.next = None if stage.is_last else ranks[own + 1]
        self.hidden_size = stage.hidden_size
        self.virtual_tokens = stage.virtual_tokens
        self.dtype = wire_dtype(model)
        self.device = next(model.parameters()).device

    def exchange(self, *, send: _Message | None = None, receive: _Message | None = None) -> Tensor | None:
        """Send and receive at once; gives what was received."""
        works = []
        if send is not None:
            works.append(dist.P2POp(dist.isend, *send))
        if receive is not None:
            works.append(dist.P2POp(dist.irecv, *receive))
        for request in dist.batch_isend_irecv(works) if works else ():
            request.wait()
        return None if receive is None else receive[0]

    def before(self, batch: Batch) -> _Message | None:
        """Room for the hidden states that come from the stage before."""
        return None if self.previous is None else (self._empty(batch), self.previous)

    def after(self, output: Tensor) -> _Message | None:
        """The hidden states for the stage after."""
        return None if self.next is None else (output.detach().to(self.dtype).contiguous(), self.next)

    def gradient_after(self, batch: Batch) -> _Message | None:
        """Room for the gradient that comes from the stage after."""
        return None if self.next is None else (self._empty(batch), self.next)

    def gradient_before(self, hidden: Tensor) -> _Message:
        """The gradient for the stage before."""
        assert self.previous is not None
        gradient = torch.zeros_like(hidden) if hidden.grad is None else hidden.grad
        return gradient.contiguous(), self.previous

    def _empty(self, batch: Batch) -> Tensor:
        rows, length = batch.input_ids.shape
        shape = (rows, length + self.virtual_tokens, self.hidden_size)
        return torch.empty(shape, dtype=self.dtype, device=self.device)
