"""Answers from a model that several ranks hold: rank 0 decides, and what it does to its rows all of them do.

Rank 0 has the requests, chooses the tokens, and tells each pass to the ranks that answer with it: those of its copy of
the model, or all where ZeRO-3 shares the parameters. Each of them has the keys and values of what it computes.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from collie_core.serving.batch import Batch
from collie_core.topology import Topology

IDLE = ("idle", None)  # a message that there is nothing to do now


class Wire:
    """From rank 0 to the others that answer with it.

    Args:
        topology: of the run.
        everyone: whether all ranks take part, and not only those that hold rank 0's copy of the model.
    """

    def __init__(self, topology: Topology, *, everyone: bool = False) -> None:
        self.takes_part = everyone or 0 in topology.model.ranks or topology.rank == 0
        self.shared = topology.world_size > 1 if everyone else topology.model.size > 1
        self._group = dist.group.WORLD if everyone else topology.model.group
        self._device = topology.device

    def send(self, message: Any) -> None:
        """On rank 0: a message to the others. None, that there is nothing to do, costs one small broadcast."""
        if not self.shared:
            return
        data = b"" if message is None else pickle.dumps(message)
        dist.broadcast(torch.tensor([len(data)], device=self._device), 0, group=self._group)
        if data:
            dist.broadcast(torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self._device), 0, group=self._group)

    def receive(self) -> Any:
        """On the others: the next message."""
        length = torch.zeros(1, dtype=torch.long, device=self._device)
        dist.broadcast(length, 0, group=self._group)
        if not length.item():
            return None
        data = torch.empty(int(length.item()), dtype=torch.uint8, device=self._device)
        dist.broadcast(data, 0, group=self._group)
        return pickle.loads(data.cpu().numpy().tobytes())  # noqa: S301  (rank 0 of this run)


class SharedBatch:
    """Rank 0's share of the rows, and through the wire those of the others; as `Batch`."""

    def __init__(self, batch: Batch, wire: Wire) -> None:
        self._batch = batch
        self._wire = wire

    def join(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """See `Batch`."""
        self._wire.send(("join", [list(prompt) for prompt in prompts]))
        return self._batch.join(prompts)

    def step(self, tokens: Sequence[int]) -> Tensor:
        """See `Batch`."""
        self._wire.send(("step", list(tokens)))
        return self._batch.step(tokens)

    def keep(self, rows: Sequence[int]) -> None:
        """See `Batch`."""
        self._wire.send(("keep", list(rows)))
        self._batch.keep(rows)

    def clear(self) -> None:
        """See `Batch`."""
        self._wire.send(("keep", []))
        self._batch.clear()


def follow(batch: Batch, wire: Wire, message: Any) -> None:
    """On a rank that is not the first: do as rank 0 says, from its first `message` until there is nothing to do."""
    while message is not None:
        name, argument = message
        if message != IDLE:
            getattr(batch, name)(argument)
        message = wire.receive()
