"""Loss, speed and memory between two log lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from collie_core.topology import Topology


class Meter:
    """Sums over the steps since the last reading. The loss stays on the device until it is read."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self.total_tokens = 0
        self.restart()

    def restart(self) -> None:
        """Begin a new interval now."""
        self.losses: list[Tensor] = []
        self.tokens = 0
        self.started = time.perf_counter()

    def add(self, loss: Tensor, tokens: int) -> None:
        """One step: the loss of the global batch (NaN: it does not count), the tokens this rank read, no padding."""
        self.losses.append(loss)
        self.tokens += tokens

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside belongs to no step."""
        began = time.perf_counter()
        yield
        self.started += time.perf_counter() - began

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: sums over all ranks. Collective, as `read`."""
        losses = [loss.item() for loss in self.losses]
        tokens = int(self.topology.sum_over_data(self.tokens))
        return {"total_tokens": self.total_tokens, "losses": losses, "tokens": tokens}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with what `state` gave."""
        self.total_tokens = state["total_tokens"]
        self.losses = [torch.tensor(loss, device=self.topology.device) for loss in state["losses"]]
        self.tokens = state["tokens"] if self.topology.dp.rank == 0 else 0

    def read(self) -> dict[str, float]:
        """Mean loss and step time over the interval, tokens so far, per second over all ranks and per rank, peak bytes.

        Collective: every data-parallel rank reads at the same step.
        """
        loss = torch.stack(self.losses).nanmean().item()  # waits for the device, so the clock is read after it
        seconds = time.perf_counter() - self.started
        tokens = int(self.topology.sum_over_data(self.tokens))
        self.total_tokens += tokens
        values = {
            "loss": loss,
            "tokens": self.total_tokens,
            "tokens_per_second": tokens / seconds,
            "tokens_per_second_per_device": tokens / seconds / self.topology.world_size,
            "step_time_s": seconds / len(self.losses),
            "peak_memory_bytes": peak_memory_bytes(self.topology.device),
        }
        self.restart()
        return values


def peak_memory_bytes(device: torch.device) -> int:
    """Most bytes ever allocated on a CUDA device, or resident in this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
