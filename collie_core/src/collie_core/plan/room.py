"""How much memory there is here for the ranks of a run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collie_core.plan.plan import Plan

CGROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")  # Linux only
# Limit, use, and what the kernel gives back of that by itself (the cache of files), in both versions of cgroups.
_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


@dataclass(frozen=True)
class Room:
    """Memory that ranks share: that of a GPU has one, the main memory of a machine all that run on it."""

    nbytes: int
    ranks: int
    gpu: str = ""  # its name
    host: Room | None = None  # for what GPUs offload; None: as much as they need

    @classmethod
    def here(cls) -> Room:
        """Of the GPU of this process, or of this machine. Does not take hold of the GPU."""
        if torch.cuda.is_available():
            device = torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", "0")))
            return cls(device.total_memory, 1, device.name, cls._main_memory())
        return cls._main_memory()

    @classmethod
    def _main_memory(cls) -> Room:
        return cls(free_memory(), ranks_of_this_machine())

    def holds(self, plan: Plan) -> bool:
        """Whether all ranks fit."""
        return not self.short(plan) and not self.host_short(plan)

    def short(self, plan: Plan) -> int:
        """Bytes that ranks need more than there are."""
        return max(0, self.needed(plan.predicted) - self.nbytes)

    def host_short(self, plan: Plan) -> int:
        """The same of host memory, for what is offloaded."""
        return 0 if self.host is None or not plan.offloads else max(0, self.host.needed(plan.host) - self.host.nbytes)

    def needed(self, held: Mapping[int, int]) -> int:
        """The most that ranks who share such memory hold together; `held` has the bytes of each rank."""
        everyone = [held[rank] for rank in sorted(held)]  # launchers give neighbouring ranks to one machine
        return max(sum(everyone[first : first + self.ranks]) for first in range(0, len(everyone), self.ranks))


def ranks_of_this_machine() -> int:
    """How many processes of the run share its memory."""
    world, machines = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("SLURM_STEP_NUM_NODES", "1"))
    return int(os.environ.get("LOCAL_WORLD_SIZE", -(-world // machines)))


def free_memory() -> int:
    """Bytes of main memory that processes here can still get without swapping, in a container those it may have."""
    import psutil  # type: ignore[import-untyped]

    free: int = min([psutil.virtual_memory().available, *_left_by_cgroups()])
    return max(0, free)


def _left_by_cgroups() -> Iterator[int]:
    """What each limit leaves that stands above this process."""
    for line in OWN.read_text().splitlines() if OWN.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top, names = (CGROUPS / controllers, _V1) if controllers else (CGROUPS, _V2)
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top) and (folder / names[0]).exists():
                yield from _left_in(folder, *names)


def _left_in(folder: Path, limit: str, use: str, cached: str) -> Iterator[int]:
    most = (folder / limit).read_text().strip()
    if most != "max":
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        yield int(most) - int((folder / use).read_text()) + int(stat.get(cached, 0))
