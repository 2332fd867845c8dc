"""Functions called in processes that are forked for one call each and leave nothing behind."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any

from collie_core.errors import CollieError, ConfigError, RunError


class Killed(RunError):
    """A process of the plan was ended from outside: nothing is known of what it was to plan."""


@dataclass(frozen=True)
class _Crash:
    stack: str


def each_in_child(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
    """What `function` returns for the arguments of each call, in order; as many at a time as there are cores.

    Raises:
        CollieError: of the first call that raised one, or a process was killed.
        RuntimeError: any other error, with its stack.
    """
    context = multiprocessing.get_context("fork")
    waiting = list(enumerate(calls))[::-1]
    running: dict[Connection, tuple[int, ForkProcess]] = {}
    results: dict[int, Any] = {}
    try:
        while waiting or running:
            while waiting and len(running) < (os.cpu_count() or 1):
                number, arguments = waiting.pop()
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_call, args=(theirs, function, arguments))
                process.start()
                theirs.close()
                running[ours] = number, process
            for ready in wait(list(running)):
                assert isinstance(ready, Connection)
                number, process = running[ready]
                results[number] = _received(ready, process)
                del running[ready]
    finally:
        for _, process in running.values():
            process.kill()
            process.join()
    return [results[number] for number in range(len(calls))]


def _call(answer: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C of the terminal is for the parent too, which ends this one
    gc.freeze()  # what the parent has made stays; collecting looks at the rest alone
    try:
        found = function(*arguments)
    except ConfigError as error:  # its problems do not travel
        found = RunError(str(error))
    except CollieError as error:
        found = error
    except Exception:  # noqa: BLE001  (raised by the parent)
        found = _Crash(traceback.format_exc())
    answer.send(found)


def _received(answer: Connection, process: ForkProcess) -> Any:
    try:
        found = answer.recv()
    except EOFError:
        found = None
    process.join()
    if process.exitcode:
        raise Killed(f"a process of the plan ended with exit code {process.exitcode}; it may have run out of memory")
    if isinstance(found, _Crash):
        raise RuntimeError(f"in a process of the plan:\n{found.stack}")
    if isinstance(found, CollieError):
        raise found
    return found
