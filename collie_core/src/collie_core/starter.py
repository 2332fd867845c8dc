"""Starting the processes of a run on this machine: waiting for them, passing signals on, starting them again.

This process imports no torch and has nothing to lose: what a run goes on from lies in its checkpoints.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collie_core.checkpoint import files
from collie_core.checkpoint.signals import handled
from collie_core.errors import ConfigError, Problem, RunError
from collie_core.report.rundir import CHECKPOINTS, refuse_used_directory
from collie_core.watch import OURS, STORE_FD

if TYPE_CHECKING:
    from collie_core.config.run import RunConfig

SETTLE_S = (
    5.0  # for the other ranks to end by themselves once one has failed, or without checkpoints was asked to leave
)
_LOOKS_EVERY_S = 0.05
_HERE = "127.0.0.1"


class _Mistake(RunError):
    """A rank found that what it was given is wrong."""

    exit_code = 2


@dataclass(frozen=True)
class Failure:
    """Why the processes of an attempt have ended."""

    sentence: str
    details: str = ""  # stacks, to stand before it
    code: int = 1  # with which the rank ended that failed first
    mends: bool = True  # whether all may be well in another start

    def raise_as(self, sentence: str) -> None:
        """As the error of the whole run."""
        text = "\n".join(filter(None, (self.details, sentence)))
        raise (_Mistake if self.code == 2 else RunError)(text)


@dataclass
class Restarts:
    """How often all processes may be started again, and where that has led so far."""

    most: int
    folder: Path  # of the run's checkpoints
    done: int = 0
    since: str | None = ""  # from which checkpoint the last one went on; "" before the first
    in_vain: int = 0  # restarts in a row after which no other checkpoint was saved

    @classmethod
    def of(cls, most: int, config: RunConfig) -> Restarts:
        """As the command line asks for them.

        Raises:
            ConfigError: the run saves no checkpoints.
            RunError: the output folder is in use.
        """
        if most and config.checkpoint.save_steps is None:
            rule = f"--max-restarts {most} starts a run again from its last checkpoint, and this one saves none"
            raise ConfigError([Problem("checkpoint.save_steps", rule, None, "Set checkpoint.save_steps.")])
        if most and config.checkpoint.resume_from_checkpoint is None:
            refuse_used_directory(config)  # before a restart could take it for that of its own run
        return cls(most, Path(config.train.output_dir) / CHECKPOINTS)

    def after(self, failure: Failure) -> None:
        """Say that all processes start again.

        Raises:
            RunError: they do not, since it would not help or has been done as often as it may be.
        """
        if not failure.mends or self.most == 0:
            failure.raise_as(failure.sentence)
        newest = next((path.name for path in files.checkpoints_in(self.folder)), None)
        self.in_vain = self.in_vain + 1 if newest == self.since else 0
        where = "begins again, since it has saved no checkpoint" if newest is None else f"goes on from {newest}"
        if self.done == self.most:
            failure.raise_as(f"{failure.sentence}\nno restart is left of --max-restarts {self.most}{self._vain()}")
        self.done, self.since = self.done + 1, newest
        again = ", as the last time" if self.in_vain else ""
        line = f"restart {self.done} of {self.most}: {failure.sentence}; the run {where}{again}"
        print("\n".join(filter(None, (failure.details, line))), file=sys.stderr, flush=True)

    def _vain(self) -> str:
        if self.in_vain == 0:
            return ""
        last, they = (f"last {self.in_vain}", "they") if self.in_vain > 1 else ("last one", "it")
        return f"; the {last} saved no checkpoint beyond where {they} began"


def start(processes: int, arguments: Sequence[str], config: RunConfig | None = None, *, max_restarts: int = 0) -> int:
    """Run `collie` with these arguments in so many processes of this machine, and wait for all of them.

    The first that fails ends the others. SIGTERM, SIGUSR1 and Ctrl-C go to all of them, and a second Ctrl-C ends them
    at once. Ranks that save checkpoints get `parallel.timeout_s` to save and to leave, others `SETTLE_S`.

    Args:
        processes: how many; their number is that of the ranks.
        arguments: of the command line.
        config: of a run that may save checkpoints.
        max_restarts: how often all are started again when one is lost.

    Returns:
        The exit code: 0 also when they have left since a signal asked them to.

    Raises:
        RunError: one failed; with its rank and the reason it gave.
        ConfigError: there are to be restarts and no checkpoints.
    """
    saves = config is not None and config.checkpoint.save_steps is not None
    restarts = Restarts(0, Path()) if config is None else Restarts.of(max_restarts, config)
    patience = config.parallel.timeout_s if config is not None and saves else SETTLE_S
    with _signals() as got, tempfile.TemporaryDirectory(prefix="collie-") as folder:
        while True:
            attempt = _Attempt.start(processes, arguments, Path(folder) / str(restarts.done), restarts.done)
            try:
                attempt.wait(got, patience)
            finally:
                attempt.end()
            if got:
                return attempt.code_of_leaving(got, saves=saves, patience=patience)
            failure = attempt.failure()
            if failure is None:
                return 0
            restarts.after(failure)


@contextmanager
def _signals() -> Iterator[list[signal.Signals]]:
    """Those that this process gets inside, in order; none in another thread than the main one."""
    got: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield got
        return
    with handled(lambda number, _: got.append(signal.Signals(number))):
        yield got


@dataclass
class _Attempt:
    """All processes from one start to their end."""

    ranks: list[subprocess.Popen[bytes]]
    folder: Path  # where each leaves the reason for which it ends
    ended: set[int] = field(default_factory=set)  # those that this process has ended

    @classmethod
    def start(cls, processes: int, arguments: Sequence[str], folder: Path, number: int) -> _Attempt:
        """Each in a session of its own, so that a Ctrl-C of the terminal comes here alone and can be counted."""
        folder.mkdir()
        attempt = cls([], folder)
        with socket.create_server((_HERE, 0)) as store:
            for rank in range(processes):
                takes = {STORE_FD: str(store.fileno())} if rank == 0 else {}
                own = _environment(rank, processes, store.getsockname()[1], number, folder)
                attempt.ranks.append(
                    subprocess.Popen(
                        _command(arguments),
                        env=os.environ | own | takes,
                        pass_fds=[store.fileno()] if rank == 0 else [],
                        start_new_session=True,
                    )
                )
        return attempt

    def wait(self, got: Sequence[signal.Signals], patience: float) -> None:
        """Until all have ended; those that take too long after a failure or a signal are ended.

        Raises:
            KeyboardInterrupt: a second Ctrl-C.
        """
        passed, until = 0, float("inf")
        while (codes := [rank.poll() for rank in self.ranks]).count(None):
            for number in got[passed:]:
                passed += 1
                if list(got[:passed]).count(signal.SIGINT) > 1:
                    raise KeyboardInterrupt
                self._send(number)
                until = min(until, time.monotonic() + patience)
            if any(codes) and until == float("inf"):
                until = time.monotonic() + SETTLE_S
            if time.monotonic() > until:
                self.end()
            time.sleep(_LOOKS_EVERY_S)

    def _send(self, number: signal.Signals) -> None:
        for rank in self.ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    def end(self) -> None:
        """Kill what still runs, with all processes that it has started, and those that a killed rank has left."""
        for number, rank in enumerate(self.ranks):
            if rank.poll() is None:
                self.ended.add(number)
            if (rank.returncode or 0) < 0 or number in self.ended:
                with suppress(ProcessLookupError):
                    os.killpg(rank.pid, signal.SIGKILL)
        for rank in self.ranks:
            rank.wait()

    def code_of_leaving(self, got: Sequence[signal.Signals], *, saves: bool, patience: float) -> int:
        """The exit code after a signal.

        Raises:
            RunError: a rank failed, or did not leave in time.
            KeyboardInterrupt: Ctrl-C came, and there was nothing to save.
        """
        codes, first = [rank.returncode for rank in self.ranks], got[0]
        if not any(codes):
            return 0
        if signal.SIGINT in got and (not saves or {130, -signal.SIGINT} & set(codes)):
            raise KeyboardInterrupt
        if not saves:
            return 128 + first
        if all(code in (0, -first) for code in codes):  # one was asked before it could listen
            print(f"{first.name} came before there was anything to save: the run ends", file=sys.stderr)
            return 0
        if self.ended and all(code == 0 for rank, code in enumerate(codes) if rank not in self.ended):
            raise RunError(f"{first.name} came, and the ranks did not leave within parallel.timeout_s={patience:g}")
        failure = self.failure()
        assert failure is not None
        failure.raise_as(failure.sentence)
        return failure.code

    def failure(self) -> Failure | None:
        """Of the rank that failed first: killed, or by the time at which it told why. Echoes come last."""
        failed = [number for number, rank in enumerate(self.ranks) if rank.returncode]
        if not failed:
            return None
        reasons = {number: self._reason(number) for number in failed}
        return self._told(min(failed, key=lambda number: self._order(number, reasons[number])), reasons)

    def _order(self, number: int, reason: dict[str, Any]) -> tuple[int, float]:
        """Killed ranks, those with a reason of their own, those that heard of another's, and those ended from here."""
        if number in self.ended:
            return 3, 0.0
        if not reason:
            return int(self.ranks[number].returncode > 0), 0.0
        return 1 if reason.get("about") is None else 2, float(reason["time"])

    def _told(self, number: int, reasons: dict[int, dict[str, Any]]) -> Failure:
        code, reason, count = self.ranks[number].returncode, reasons[number], len(self.ranks)
        who = f"rank {number} of {count}" if count > 1 else "the process"
        if not reason:
            if code > 0:
                return Failure(f"{who} ended with exit code {code} and gave no reason", mends=code == 1)
            name = signal.Signals(-code).name
            hint = "; the system may have run out of memory" if name == "SIGKILL" else ""
            return Failure(f"{who} was ended by {name}{hint}")
        sentence, details = reason["message"], reason["details"]
        if reason["about"] is None and count > 1 and not sentence.startswith("rank "):
            sentence = f"{who} failed: {sentence}"
        return Failure(sentence, details, code, reason["mends"])

    def _reason(self, number: int) -> dict[str, Any]:
        """What a rank has left; nothing where it had no time for it."""
        with suppress(OSError, ValueError):
            message = json.loads((self.folder / str(number)).read_text())["message"]
            return {**message["extraInfo"], "message": message["message"]}
        return {}


def _command(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "collie_core.cli", *arguments]


def _environment(rank: int, processes: int, port: int, attempt: int, folder: Path) -> dict[str, str]:
    """As torchrun sets it."""
    own = {
        OURS: "1",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "GROUP_RANK": "0",
        "MASTER_ADDR": _HERE,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RESTART_COUNT": str(attempt),
        "TORCHELASTIC_ERROR_FILE": str(folder / str(rank)),
    }
    if processes > 1 and "OMP_NUM_THREADS" not in os.environ:
        own["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))
    return own
