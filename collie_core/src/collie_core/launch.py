"""Processes of a run: found as torchrun or srun have started them, or to be started; see `collie_core.starter`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from collie_core.checkpoint import files
from collie_core.checkpoint.signals import Leave
from collie_core.errors import CollieError, RunError
from collie_core.hub import Fault
from collie_core.report.rundir import CHECKPOINTS, is_unfinished
from collie_core.watch import OURS, Watch, end_process, is_launched, is_witness, leave_reason, reason_of

if TYPE_CHECKING:
    from collie_core.config.parallel import ParallelConfig
    from collie_core.config.run import RunConfig


def processes_to_start(asked: int | None, parallel: ParallelConfig | None = None, *, restarts: int = 0) -> int:
    """How many processes this one should start: 1 means none, go on as you are, unless there are to be restarts.

    Under torchrun and srun the processes are there already. Otherwise as many as `asked`, by default one per GPU, and
    without GPUs as few as `parallel` needs.

    Raises:
        RunError: `asked` for processes or `restarts` where a launcher has started them.
    """
    if launched():
        if asked is not None and OURS not in os.environ:
            raise RunError(f"--nproc {asked}: a launcher has started the processes already; leave --nproc out")
        if restarts and OURS not in os.environ:
            raise RunError(f"--max-restarts {restarts}: a launcher has started the processes; tell it to restart them")
        return 1
    if asked is not None:
        if asked < 1:
            raise RunError(f"--nproc {asked}: must be at least 1")
        return asked
    import torch

    return torch.cuda.device_count() or (1 if parallel is None else parallel.fewest_processes)


def launched() -> bool:
    """Whether torchrun, srun or one of ours has started this process as a rank of a run."""
    _adopt_slurm()
    return "RANK" in os.environ


Agree = Callable[[Mapping[str, str]], None]


def _trust(_: Mapping[str, str]) -> None:
    """Processes of one machine and one command agree."""


@contextmanager
def reported_to_launcher() -> Iterator[Agree]:
    """Inside a launched process: the failure of one rank ends them all and is told once. Else this does nothing.

    What it gives lets the ranks watch over each other, before there is a process group too, and ends the run where a
    fact is not the same on all of them; see `collie_core.watch`. Where the processes have been started by `start` the
    reason is left for it, and elsewhere one process on each machine speaks.
    """
    _adopt_slurm()
    if "RANK" not in os.environ:
        yield _trust
        return
    if OURS in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:  # the parent is a launcher that stays
        die_with_parent()
    ranks = _Ranks()
    try:
        yield ranks.agree
    except (Exception, KeyboardInterrupt, Leave) as error:  # noqa: BLE001  (told, and the process ended)
        _fail(error, ranks)
    if ranks.watch is not None:
        ranks.watch.leave()


class _Ranks:
    """The watch of a launched process, from the first time that it agrees with the others."""

    def __init__(self) -> None:
        self.watch: Watch | None = None
        self._asked = False

    def agree(self, facts: Mapping[str, str]) -> None:
        """See `reported_to_launcher`."""
        first, self._asked = not self._asked, True
        if first and (OURS in os.environ or is_launched()):
            self.watch = Watch.join(end_process)
        if self.watch is not None and facts:
            self.watch.agree(facts)


def _fail(error: BaseException, ranks: _Ranks) -> NoReturn:
    """End this process with the reason. Not through exit handlers: some wait for the other ranks."""
    leaves = isinstance(error, Leave)
    reason = told = str(error) if leaves else reason_of(error)
    stack = "" if leaves or isinstance(error, CollieError) else traceback.format_exc().rstrip()
    code = 0 if leaves else 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
    mends = isinstance(error, Fault) if isinstance(error, CollieError) else code == 1
    ours = OURS in os.environ  # then the launcher speaks, and knows the rank
    if not (ours and leaves):  # there the launcher has passed the signal on
        with suppress(Exception):  # where the others are not found, this one speaks for itself
            ranks.agree({})
    if (watch := ranks.watch) is not None:
        ending = watch.fail(reason, witness=is_witness(error), code=code, mends=mends)
        if ending.rank != watch.member.rank:
            end_process(watch, ending)
        told = ending.sentence
    leave_reason(reason if ours else told, details=stack, mends=mends)
    if not ours or (leaves and (watch is not None or os.environ["RANK"] == "0")):
        shown = not leaves and os.environ.get("COLLIE_TRACEBACK", "0") not in ("", "0")
        print(f"{traceback.format_exc() if shown else stack}\n{told}".lstrip(), file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


def restart_overrides(config: RunConfig) -> list[str]:
    """What a launched process changes of its configuration when all have been started again, by us or by torchrun.

    The run goes on from its own newest checkpoint; as long as it has none it begins again as it began.
    """
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" or config.checkpoint.save_steps is None:
        return []
    output_dir = Path(config.train.output_dir)
    if config.checkpoint.resume_from_checkpoint is None or files.checkpoints_in(output_dir / CHECKPOINTS):
        return ["checkpoint.resume_from_checkpoint=auto"]
    return ["train.overwrite_output_dir=true"] if is_unfinished(output_dir) else []


def die_with_parent() -> None:
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
