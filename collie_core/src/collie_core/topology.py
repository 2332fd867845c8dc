"""Where this process stands among the others: an immutable value, passed in and never global.

Only `Topology.start` touches `torch.distributed`; everything else asks the value it was given.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError

from collie_core.errors import CollieError, RunError
from collie_core.hub import first_unlike_lines
from collie_core.watch import limit

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch.distributed import ProcessGroup

    from collie_core.config.parallel import ParallelConfig


WATCHED_S = 60.0  # that collectives wait longer than the watch, which says more


@dataclass(frozen=True)
class Axis:
    """One direction of parallelism: the ranks that differ from this one in that direction alone."""

    size: int = 1
    rank: int = 0  # along the axis
    group: ProcessGroup | None = field(default=None, compare=False, repr=False)
    ranks: tuple[int, ...] = (0,)  # global, in the order of the axis

    def __deepcopy__(self, memo: dict[int, Any]) -> Axis:
        return self  # a copied model works with the same processes


@dataclass(frozen=True)
class Topology:
    """Sizes, ranks and groups of the run. `local_rank` counts the processes of this machine.

    Ranks are laid out with the tensor-parallel axis fastest (its neighbours share a machine), then data, then
    pipeline: rank = (pp * dp_size + dp) * tp_size + tp.
    """

    dp: Axis = Axis()
    tp: Axis = Axis()
    pp: Axis = Axis()
    model: Axis = Axis()  # all ranks that together hold one copy of the model
    world_size: int = 1
    rank: int = 0
    local_rank: int = 0

    @classmethod
    def start(cls, parallel: ParallelConfig) -> Topology:
        """The topology of this process, from the launcher's environment (torchrun, srun) and the config.

        Starts `torch.distributed` (nccl on CUDA, gloo elsewhere) when there is more than one process and the
        embedding program has not started it.

        Raises:
            RunError: the sizes asked for do not multiply to the number of processes.
        """
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        rank = int(os.environ.get("RANK", "0"))
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        sizes = _axis_sizes(parallel, world_size)
        if world_size == 1:
            return cls()
        timeout = timedelta(seconds=parallel.timeout_s + WATCHED_S)
        if not dist.is_initialized():
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            if torch.cuda.is_available():
                torch.cuda.set_device(local_rank)
            limit(parallel.timeout_s)
            dist.init_process_group(backend, timeout=timeout)
        grid = np.arange(world_size).reshape(sizes)  # [pp, dp, tp]
        pp, dp, tp = (_axis(np.moveaxis(grid, dim, -1).reshape(-1, sizes[dim]), rank, timeout) for dim in range(3))
        model = _axis(np.moveaxis(grid, 1, 0).reshape(sizes[1], -1), rank, timeout)
        return cls(dp, tp, pp, model, world_size, rank, local_rank)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the person."""
        return self.rank == 0

    @property
    def groups(self) -> list[ProcessGroup]:
        """All groups of this process, that of all ranks first."""
        if self.world_size == 1 or not dist.is_initialized():
            return []
        axes = (axis.group for axis in (self.dp, self.tp, self.pp, self.model))
        return list(dict.fromkeys(group for group in (dist.group.WORLD, *axes) if group is not None))

    @property
    def device(self) -> torch.device:
        """The device of this process: its own GPU, or the CPU."""
        if torch.cuda.is_available():
            return torch.device("cuda", self.local_rank)
        return torch.device("cpu")

    def sum_over_data(self, value: int | float) -> int | float:
        """The sum of a number over the data-parallel ranks, exact for integers below 2^53."""
        if self.dp.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total, group=self.dp.group)
        return type(value)(total.item())

    def gather_objects(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def on_main(self, action: Callable[[], Any], *, failing: str, others: Callable[[], object] | None = None) -> Any:
        """What `action` gives on the main rank, on every rank; elsewhere `others` runs meanwhile. Collective.

        Args:
            action: may raise a `CollieError`, or fail to read or write a file.
            failing: what is the matter when it cannot read or write, as in "the model cannot be written".
            others: takes part in the collectives of `action`.

        Raises:
            CollieError: the main rank has failed; on every rank.
        """
        failure: CollieError | None = None
        value = None
        if self.is_main:
            try:
                value = action()
            except CollieError as error:
                failure = error
            except (OSError, SafetensorError) as error:
                failure = RunError(f"{failing}: {error}")
        elif others is not None:
            others()
        raised, given = self.gather_objects((failure, value))[0]
        if raised is not None:
            raise failure or raised
        return given

    def require_same(self, facts: Mapping[str, str]) -> None:
        """Stop on every rank when a fact differs between them. Collective.

        Raises:
            RunError: names the fact, the rank and both values.
        """
        everyone = self.gather_objects(dict(facts))
        for rank, theirs in enumerate(everyone):
            for name, value in everyone[0].items():
                if theirs.get(name) != value:
                    other, own = first_unlike_lines(theirs.get(name, ""), value)
                    raise RunError(f"rank {rank} has {name} {other!r}, and rank 0 has {own!r}")

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()


def _axis_sizes(parallel: ParallelConfig, world_size: int) -> tuple[int, int, int]:
    """Pipeline, data and tensor size for so many processes."""
    tp, pp, wanted = parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.data_parallel_size
    copies, rest = divmod(world_size, tp * pp)
    if rest or copies == 0:
        raise RunError(
            f"parallel.tensor_parallel_size={tp} x parallel.pipeline_parallel_size={pp} needs a multiple of {tp * pp} "
            f"processes, but {world_size} were started; start the run with --nproc {tp * pp * max(1, copies)}"
        )
    if wanted not in ("auto", copies):
        needed = int(wanted) * tp * pp
        raise RunError(
            f"parallel.data_parallel_size={wanted} needs {needed} processes, but {world_size} were started; "
            f"set it to auto, or start the run with --nproc {needed}"
        )
    return pp, copies, tp


def _axis(rows: NDArray[np.int64], rank: int, timeout: timedelta) -> Axis:
    """The axis whose ranks are the row with `rank`. Collective: every rank makes every group."""
    mine = Axis()
    for row in rows.tolist():
        group = dist.group.WORLD if len(row) == rows.size else dist.new_group(row, timeout) if len(row) > 1 else None
        if rank in row:
            mine = Axis(len(row), row.index(rank), group, tuple(row))
    return mine
