"""The clocks of several machines."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collie_core.topology import Topology

ROUNDS = 20


def ahead_of_here(topology: Topology) -> float:
    """Seconds by which the clock of rank 0 is ahead of this rank's. Collective.

    Processes of one machine have one clock. Between machines it is found as NTP finds it, from the round trip that
    takes the shortest, and is off by less than half of that.
    """
    machines = topology.gather_objects(_machine())
    first = {machine: machines.index(machine) for machine in machines}  # the first rank of each
    ahead = 0.0
    for other in sorted(set(first.values()) - {0}):
        if topology.rank == other:
            ahead = _ask(topology.device)
        elif topology.rank == 0:
            _answer(other, topology.device)
    return float(topology.gather_objects(ahead)[first[machines[topology.rank]]])


def _ask(device: torch.device) -> float:
    found = []
    time_there = torch.zeros((), dtype=torch.float64, device=device)
    for _ in range(ROUNDS):
        began = time.perf_counter()
        dist.send(time_there, 0)
        dist.recv(time_there, 0)
        there, ended = float(time_there), time.perf_counter()
        found.append((ended - began, there - (began + ended) / 2))
    return min(found)[1]


def _answer(asking: int, device: torch.device) -> None:
    question = torch.zeros((), dtype=torch.float64, device=device)
    for _ in range(ROUNDS):
        dist.recv(question, asking)
        _ = float(question)  # it has come
        dist.send(torch.tensor(time.perf_counter(), dtype=torch.float64, device=device), asking)


def _machine() -> str:
    """What two processes have in common when they have one clock."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    if boot.exists():
        return boot.read_text(encoding="ascii").strip()
    import platform

    return platform.node()
