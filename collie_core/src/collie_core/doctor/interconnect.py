"""How fast the processes of this machine exchange tensors."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from collie_core.doctor.finding import Finding, error, ok, warning

SIZES = {"gloo": (2**16, 2**20, 2**24), "nccl": (2**20, 2**24, 2**28)}  # bytes
ROUNDS = 5
PATIENCE_S = 60.0
SLOW_GPUS = 5e9  # bytes per second: half of what PCI Express 3 with 16 lanes gives


def check() -> Iterator[Finding]:
    """All-reduce among two processes with gloo, and among the GPUs with nccl."""
    import torch

    yield measured("gloo", 2)
    gpus = torch.cuda.device_count()
    if gpus > 1 and torch.distributed.is_nccl_available():
        yield measured("nccl", gpus)


def measured(backend: str, processes: int) -> Finding:
    """The bandwidth of an all-reduce of each of `SIZES`, in MB (10^6 bytes) per second on each process."""
    found = run(backend, processes)
    where = f"{processes} {'GPUs' if backend == 'nccl' else 'processes'}"
    if isinstance(found, str):
        return error(f"all-reduce among {where} with {backend} fails: {found}", _WAYS_OUT[backend])
    rates = {size: size / seconds for size, seconds in found.items()}
    listed = ", ".join(f"{_size(size)} at {rate / 1e6:,.0f} MB/s" for size, rate in rates.items())
    text = f"all-reduce among {where} with {backend}: {listed}"
    if backend == "nccl" and max(rates.values()) < SLOW_GPUS:
        return warning(text, "see nvidia-smi topo -m for what lies between the GPUs, and unset NCCL_P2P_DISABLE")
    return ok(text)


_WAYS_OUT = {
    "gloo": "let the host name resolve to an address of this machine, or set GLOO_SOCKET_IFNAME=lo; look at firewalls",
    "nccl": "run again with NCCL_DEBUG=INFO, and give a container --shm-size=8g or --ipc=host",
}


def _size(nbytes: int) -> str:
    return f"{nbytes // 2**20} MiB" if nbytes >= 2**20 else f"{nbytes // 2**10} KiB"


def run(backend: str, processes: int) -> dict[int, float] | str:
    """Seconds by size as the first process measured them, or why there are none."""
    # A process that has touched its GPU must not be forked.
    context: Any = get_context("spawn" if backend == "nccl" else "fork")
    with tempfile.TemporaryDirectory(prefix="collie-doctor-") as folder:
        started = []
        for rank in range(processes):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_measure, args=(theirs, backend, rank, processes, f"{folder}/store"))
            process.start()
            theirs.close()
            started.append((process, ours))
        try:
            return _first_answer([pipe for _, pipe in started])
        finally:
            for process, _ in started:
                process.kill()
                process.join()


def _first_answer(pipes: list[Connection]) -> dict[int, float] | str:
    """Of the first process, once all have answered; or the first failure."""
    until, answers = time.monotonic() + PATIENCE_S, []
    for pipe in pipes:
        if not pipe.poll(max(0.0, until - time.monotonic())):
            return f"no answer within {PATIENCE_S:g} s"
        try:
            answers.append(pipe.recv())
        except EOFError:
            return "a process has died"
    failed = [answer for answer in answers if isinstance(answer, str)]
    found: dict[int, float] | str = failed[0] if failed else answers[0]
    return found


def _measure(answer: Connection, backend: str, rank: int, processes: int, store: str) -> None:
    """In a process of its own."""
    import torch
    import torch.distributed as dist

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what goes wrong is told once, by the parent
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        limit = timedelta(seconds=PATIENCE_S / 2)
        meeting = f"file://{store}"
        dist.init_process_group(backend, meeting, rank=rank, world_size=processes, timeout=limit)
        answer.send({size: _seconds(torch.zeros(size // 4, device=device)) for size in SIZES[backend]})
        dist.barrier()  # nobody leaves while another still exchanges
    except (RuntimeError, OSError) as failure:
        answer.send(str(failure).partition("\n")[0])


def _seconds(tensor: Any) -> float:
    """Of an all-reduce, the median of some."""
    import torch
    import torch.distributed as dist

    times = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        dist.all_reduce(tensor)
        if tensor.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])  # the first one finds the others
