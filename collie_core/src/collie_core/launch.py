"""Processes of a run: started here on one machine, or found as torchrun or srun have started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from collie_core.errors import CollieError, RunError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    from collie_core.config.parallel import ParallelConfig
    from collie_core.watch import Watch

OURS = "COLLIE_LAUNCHED"  # set for the processes that `start` starts


def processes_to_start(asked: int | None, parallel: ParallelConfig | None = None) -> int:
    """How many processes this one should start: 1 means none, go on as you are.

    Under torchrun and srun the processes are there already. Otherwise as many as `asked`, by default one per GPU, and
    without GPUs as few as `parallel` needs.

    Raises:
        RunError: `asked` for processes where a launcher has started them.
    """
    _adopt_slurm()
    if "RANK" in os.environ:
        if asked is not None and OURS not in os.environ:
            raise RunError(f"--nproc {asked}: a launcher has started the processes already; leave --nproc out")
        return 1
    if asked is not None:
        if asked < 1:
            raise RunError(f"--nproc {asked}: must be at least 1")
        return asked
    import torch

    return torch.cuda.device_count() or (1 if parallel is None else parallel.fewest_processes)


def start(processes: int, arguments: Sequence[str]) -> int:
    """Run `collie` with these arguments in so many processes of this machine, and wait for all of them.

    The first that fails ends the others at once.

    Raises:
        RunError: one failed; with its rank and the reason it gave.
    """
    import logging

    from torch.distributed.elastic.multiprocessing.api import SignalException
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
    except SignalException as error:  # the ranks got the signal too, and some seconds to save and leave
        return 128 + int(error.sigval)
    finally:
        del os.environ[OURS]
    return 0


Agree = Callable[[Mapping[str, str]], None]


def _trust(_: Mapping[str, str]) -> None:
    """Processes of one machine and one command agree."""


@contextmanager
def reported_to_launcher() -> Iterator[Agree]:
    """Inside a launched process: the failure of one rank ends them all and is told once. Else this does nothing.

    Processes that `start` started leave the reason where it looks. Under torchrun and srun the ranks watch over each
    other, before there is a process group too, and one on each machine speaks; see `collie_core.watch`. What it gives
    ends the run where a fact is not the same on all ranks.
    """
    _adopt_slurm()
    if "RANK" not in os.environ:
        yield _trust
        return
    from collie_core import watch as watching

    if OURS in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:  # the parent is a launcher that stays
        _die_with_parent()
    watch = None
    try:
        if OURS not in os.environ and watching.is_launched():
            watch = watching.Watch.join(watching.end_process)
        yield _trust if watch is None else watch.agree
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  (told, and the process ended)
        _fail(error, watch)
    if watch is not None:
        watch.leave()


def _fail(error: Exception | KeyboardInterrupt, watch: Watch | None) -> NoReturn:
    """End this process with the reason. Not through exit handlers: some wait for the other ranks."""
    from collie_core.watch import end_process, is_witness, leave_reason, reason_of

    sentence, stack = reason_of(error), "" if isinstance(error, CollieError) else traceback.format_exc().rstrip()
    if watch is not None:
        ending = watch.fail(sentence, witness=is_witness(error))
        if ending.rank != watch.member.rank:
            end_process(watch, ending)
        sentence = ending.sentence
    leave_reason(sentence, details=stack)
    if OURS not in os.environ:  # there the launcher speaks
        shown = os.environ.get("COLLIE_TRACEBACK", "0") not in ("", "0")
        print(f"{traceback.format_exc() if shown else stack}\n{sentence}".lstrip(), file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1))


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
    return f"{where} failed: {written['extraInfo']['py_callstack'].rstrip()}"


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
    """The environment of srun, where it has started several processes, in the words of torchrun."""
    if "RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return
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
