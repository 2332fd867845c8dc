"""A function in a process that is forked for it: with a file for what it prints, a time limit, and no way to harm ours.

Importing everything takes longer than a short run; a forked process has it all from the beginning.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any, Literal

from collie_core.checkpoint.signals import handled
from collie_core.errors import CollieError
from collie_core.launch import die_with_parent
from collie_core.watch import reason_of

LOOKS_EVERY_S = 0.05

Got = list[signal.Signals]


@dataclass(frozen=True)
class Ending:
    """How a call has ended."""

    status: Literal["done", "refused", "failed"]
    value: Any = None  # what the function returned
    reason: str = ""  # why it did not


@contextmanager
def signals() -> Iterator[Got]:
    """Those that this process gets inside, in order: SIGTERM, SIGUSR1 and Ctrl-C. In the main thread."""
    got: Got = []
    with handled(lambda number, _: got.append(signal.Signals(number))):
        yield got


@dataclass
class Child:
    """A call that runs."""

    process: ForkProcess
    answer: Connection
    told: Ending | None = None  # what it has sent

    @classmethod
    def start(cls, function: Callable[..., Any], arguments: Sequence[Any], log: Path) -> Child:
        """Call it in a process of its own; what is printed there goes to the end of `log`."""
        sys.stdout.flush()
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_call, args=(theirs, function, tuple(arguments), log, os.getpid()))
        process.start()
        theirs.close()
        return cls(process, ours)

    def wait(self, got: Got, *, limit_s: float | None, patience: float, look: Callable[[], None]) -> Ending | None:
        """Until it has ended; None: a signal of `got` came first, was passed on, and it has left.

        Args:
            got: signals, as they come.
            limit_s: seconds that it may take.
            patience: seconds that it has to leave after a signal; a second Ctrl-C ends it at once.
            look: called now and then.
        """
        began, until = time.monotonic(), float("inf")
        asked = False
        while self.process.is_alive():
            now = time.monotonic()
            if got and not asked:
                asked, until = True, now + patience
                self.process.terminate()
            if limit_s is not None and not asked and now > began + limit_s:
                self.end()
                return Ending("failed", reason=f"it took longer than --cell-timeout {limit_s:g} s")
            if now > until or got.count(signal.SIGINT) > 1:
                self.end()
            look()
            self.hear()
            self.process.join(LOOKS_EVERY_S)
        self.hear()
        return None if got else self.told or Ending("failed", reason=self._silent())

    def hear(self) -> None:
        """Read what it has sent."""
        with suppress(EOFError):  # it ended without a word, or has said it
            if self.answer.poll():
                self.told = self.answer.recv()

    def end(self) -> None:
        """Kill it with all that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid or 0, signal.SIGKILL)
        self.process.join()

    def _silent(self) -> str:
        code = self.process.exitcode or 0
        if code >= 0:
            return f"its process ended with exit code {code} and gave no reason"
        ended_by = signal.Signals(-code)
        hint = "; the system may have run out of memory" if ended_by is signal.SIGKILL else ""
        return f"its process was ended by {ended_by.name}{hint}"


def _call(answer: Connection, function: Callable[..., Any], arguments: tuple[Any, ...], log: Path, parent: int) -> None:
    os.setsid()  # a Ctrl-C of the terminal comes to the parent alone, and all that starts here can be ended together
    die_with_parent()
    if os.getppid() != parent:  # it was gone already
        os._exit(1)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _print_to(log)
        ending = Ending("done", function(*arguments))
    except CollieError as error:
        print(error, file=sys.stderr)
        ending = Ending("refused" if error.exit_code == 2 else "failed", reason=str(error))
    except Exception as error:  # noqa: BLE001  (told by the parent)
        traceback.print_exc()
        ending = Ending("failed", reason=reason_of(error))
    sys.stdout.flush()
    sys.stderr.flush()
    answer.send(ending)


def _print_to(log: Path) -> None:
    with log.open("ab") as file, open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
