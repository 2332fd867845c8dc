"""Processors, memory and GPUs."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from collie_core.doctor.finding import Finding, error, ok, warning
from collie_core.errors import RunError
from collie_core.report.text import memory

FIELDS = ("name", "memory.total", "memory.used", "driver_version")
IN_USE = 0.1  # of a GPU's memory, before we have used any
LITTLE_MEMORY = 2 * 2**30
CONTROL_GROUP = Path("/sys/fs/cgroup")
NO_DEVICES = 6  # exit code of nvidia-smi, by its manual
_PATIENCE_S = 20


def check() -> Iterator[Finding]:
    """What there is to compute with."""
    yield from _processors()
    yield from _memory()
    yield from _gpus()


def _processors() -> Iterator[Finding]:
    cores, allowed = os.cpu_count() or 1, usable_cores()
    if allowed < cores and "OMP_NUM_THREADS" not in os.environ:
        yield warning(
            f"{cores} CPU cores, of which this process may use {allowed:g}: each rank starts too many threads",
            f"export OMP_NUM_THREADS={max(1, int(allowed))}, divided by the number of processes",
        )
    else:
        yield ok(f"{cores} CPU cores, of which this process may use {allowed:g}")


def usable_cores() -> float:
    """As many as the affinity of this process and the quota of its container allow."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    cores = float(len(affinity(0)) if affinity else os.cpu_count() or 1)
    quota = [*_container("cpu.max"), *_container("cpu/cpu.cfs_quota_us"), *_container("cpu/cpu.cfs_period_us")]
    if len(quota) == 2 and quota[0].isdecimal():  # no limit is "max" or -1
        cores = min(cores, int(quota[0]) / int(quota[1]))
    return cores


def _container(name: str) -> list[str]:
    """The words of a file of the control group (docs.kernel.org/admin-guide: cgroup-v2, cgroup-v1); none without it."""
    path = CONTROL_GROUP / name
    return path.read_text(encoding="ascii").split() if path.exists() else []


def _memory() -> Iterator[Finding]:
    import psutil  # type: ignore[import-untyped]

    from collie_core.plan.room import free_memory

    found = psutil.virtual_memory()
    total, free = int(found.total), free_memory()
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        for limit in filter(str.isdecimal, _container(name)):
            total = min(total, int(limit))
    text = f"{memory(total)} of memory"
    text += f", as the container allows, of {memory(found.total)}" if total < found.total else ""
    if free < LITTLE_MEMORY:
        yield warning(f"{text}, {memory(free)} free", "end other programs, or train on a machine with more")
    else:
        yield ok(f"{text}, {memory(free)} free")


def _gpus() -> Iterator[Finding]:
    import torch

    try:
        seen = list(listed_by_driver())
    except RunError as failure:
        yield warning(str(failure), "if this machine has GPUs, see dmesg, restart it, or install its driver again")
        return
    built, usable = torch.version.cuda, torch.cuda.device_count()
    for number, (name, total, used, driver) in enumerate(seen):
        text = f"GPU {number}: {name}, {'memory unknown' if total is None else memory(total)}, driver {driver}"
        if total is not None and used is not None and used > IN_USE * total:
            yield warning(
                f"{text}; {memory(used)} are in use already", "see nvidia-smi for by whom, or set CUDA_VISIBLE_DEVICES"
            )
        else:
            yield ok(text)
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not seen:
        yield ok("no GPU: runs train on the CPU")
    elif built is None:
        yield warning("this torch is built for CPUs, so that the GPUs stay idle", "install a CUDA build of torch")
    elif usable == 0 and hidden is None:
        yield error(f"torch, built for CUDA {built}, cannot use any GPU", "install a driver that is new enough for it")
    elif usable < len(seen):
        yield ok(f"torch, built for CUDA {built}, may use {usable} of {len(seen)} GPUs: CUDA_VISIBLE_DEVICES={hidden}")
    else:
        yield ok(f"torch, built for CUDA {built}, can use all of them")


def listed_by_driver() -> Iterator[tuple[str, int | None, int | None, str]]:
    """Name, bytes of memory, bytes in use and driver of each GPU, as nvidia-smi tells it; none without it.

    It knows no memory of GPUs that share that of the host, and of parts of one (MIG) not always what is in use.

    Raises:
        RunError: it does not answer, or fails.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return
    command = [program, f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise RunError(f"nvidia-smi does not answer within {_PATIENCE_S} s: the driver hangs") from error
    if done.returncode == NO_DEVICES:
        return
    if done.returncode:
        said = (done.stdout + done.stderr).strip().partition("\n")[0]
        raise RunError(f"nvidia-smi fails with exit code {done.returncode}: {said}")
    for name, total, used, driver in csv.reader(done.stdout.splitlines(), skipinitialspace=True):
        yield name, _mebibytes(total), _mebibytes(used), driver


def _mebibytes(word: str) -> int | None:
    return int(word) * 2**20 if word.isdecimal() else None
