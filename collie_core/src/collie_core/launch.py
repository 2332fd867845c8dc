"""Processes of a run: started here on one machine, or found as torchrun or srun have started them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from collie_core.errors import CollieError, RunError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

OURS = "COLLIE_LAUNCHED"  # set for the processes that `start` starts


def processes_to_start(asked: int | None) -> int:
    """How many processes this one should start: 1 means none, go on as you are.

    Under torchrun and srun the processes are there already. Otherwise as many as `asked`, by default one per GPU.

    Raises:
        RunError: `asked` for processes where a launcher has started them.
    """
    if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        _adopt_slurm()
    if "RANK" in os.environ:
        if asked is not None and OURS not in os.environ:
            raise RunError(f"--nproc {asked}: a launcher has started the processes already; leave --nproc out")
        return 1
    if asked is not None:
        return asked
    import torch

    return max(1, torch.cuda.device_count())


def start(processes: int, arguments: Sequence[str]) -> int:
    """Run `collie` with these arguments in so many processes of this machine, and wait for all of them.

    The first that fails ends the others at once.

    Raises:
        RunError: one failed; with its rank and the reason it gave.
    """
    import logging

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the reason is told below, once
    os.environ[OURS] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=f"collie-{uuid.uuid4().hex[:8]}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        shutdown_timeout=5,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "collie_core.cli", *arguments)
    except ChildFailedError as error:
        raise RunError(_first_reason(error, processes)) from None
    finally:
        del os.environ[OURS]
    return 0


@contextmanager
def reported_to_launcher() -> Iterator[None]:
    """Inside a launched process: leave the reason of a failure where the launcher looks for it, and end quietly.

    Without a launcher this does nothing.
    """
    if OURS in os.environ:
        _die_with_parent()
    try:
        yield
    except Exception as error:
        file = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if file is None:
            raise
        with open(file, "w") as stream:
            json.dump(_record(error), stream)
        if OURS not in os.environ:
            raise  # torchrun shows what we say ourselves
        sys.stdout.flush()
        os._exit(1)  # not through exit handlers: some wait for the other ranks


def _record(error: Exception) -> dict[str, Any]:
    """As torchrun writes it, with the time in full: its own whole seconds do not tell who was first."""
    now = time.time()
    details = {
        "py_callstack": traceback.format_exc(),
        "timestamp": str(int(now)),
        "time": now,
        "for_people": isinstance(error, CollieError),
    }
    return {"message": {"message": str(error) or type(error).__name__, "extraInfo": details}}


def _first_reason(error: ChildFailedError, processes: int) -> str:
    """The rank that failed first, and why. Those that the launcher itself ended come last."""
    rank, failure = min(error.failures.items(), key=lambda item: _when(item[1]))
    where = f"rank {rank} of {processes}"
    written = _written(failure)
    if written is None:
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            hint = "; the system may have run out of memory" if name == "SIGKILL" else ""
            return f"{where} was ended by {name}{hint}"
        return f"{where} ended with exit code {failure.exitcode} and gave no reason"
    details = written["extraInfo"]
    reason = written["message"] if details.get("for_people") else details["py_callstack"].rstrip()
    return f"{where} failed: {reason}"


def _written(failure: ProcessFailure) -> dict[str, Any] | None:
    message = failure.error_file_data.get("message") if failure.error_file_data else None
    return message if isinstance(message, dict) else None


def _when(failure: ProcessFailure) -> tuple[bool, float]:
    """Ended by the launcher's own SIGTERM, and when."""
    written = _written(failure)
    ended_by_us = written is None and failure.exitcode == -signal.SIGTERM
    at = written["extraInfo"].get("time", failure.timestamp) if written else failure.timestamp
    return ended_by_us, float(at)


def _die_with_parent() -> None:
    """A launcher that is killed leaves no orphans behind (Linux only: elsewhere the rendezvous ends them)."""
    if sys.platform == "linux":
        import ctypes

        parent_death_signal = 1  # PR_SET_PDEATHSIG, from <sys/prctl.h>
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)


def _adopt_slurm() -> None:
    """The environment of srun in the words of torchrun."""
    nodes = os.environ.get("SLURM_STEP_NODELIST", os.environ.get("SLURM_NODELIST", ""))
    listed = subprocess.run(
        ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True, timeout=60
    )
    job = int(os.environ.get("SLURM_JOB_ID", "0"))
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["WORLD_SIZE"] = os.environ["SLURM_STEP_NUM_TASKS"]
    os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
    os.environ.setdefault("MASTER_ADDR", listed.stdout.split()[0])
    os.environ.setdefault("MASTER_PORT", str(20000 + job % 20000))  # the same on every node, another for each job
