"""Signals that ask a run to save and to leave: SIGTERM, SIGUSR1 and the first Ctrl-C.

A run leaves at once while it loads, before the next batch while it evaluates, and at the end of its step otherwise. A
second Ctrl-C leaves at once. Repeated SIGTERM and SIGUSR1 change nothing: a scheduler may send one to a launcher, which
passes it on, and to the ranks too.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from collie_core import watch
from collie_core.hang import Counting, Progress

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
AGAIN = "saving at the end of this step; press Ctrl-C again to leave at once"


class Leave(BaseException):
    """A signal came while the run loads, when there is nothing to save yet; see `listening`."""


class EvaluationLeft(Exception):
    """An evaluation ends early, on all ranks before the same batch, since a signal asked the run to leave."""


class Asked:
    """What this process was asked by signals."""

    def __init__(self, *, loading: bool = False) -> None:
        self.name = ""  # of the first one
        self.before_turn: Callable[[], None] = lambda: None  # see `Turns`
        self.interrupted = False  # by Ctrl-C
        self.loading = loading
        self.over = False  # nothing is left to save


_current: Asked | None = None  # that of the command line


@contextmanager
def listening(active: bool, *, loading: bool = False) -> Iterator[Asked]:
    """Inside, the first signal is remembered. Inside another `listening`, it is that one which listens on.

    Without `active`, or in another thread than the main one, where Python allows no handlers, nothing changes.

    Args:
        active: whether the run has anything to save.
        loading: until another `listening` begins inside there is nothing to save yet: a signal raises `Leave`, and
            Ctrl-C a KeyboardInterrupt.
    """
    global _current
    if _current is not None:
        _current.loading = False
        try:
            yield _current
        finally:
            _current.over = True
        return
    asked = Asked(loading=loading)
    if not active or threading.current_thread() is not threading.main_thread():
        yield asked
        return
    with _handlers(asked):
        _current = asked if loading else None
        try:
            yield asked
        finally:
            _current = None


@contextmanager
def _handlers(asked: Asked) -> Iterator[None]:
    owner = os.getpid()

    def remember(number: int, frame: FrameType | None) -> None:
        got = signal.Signals(number)
        if os.getpid() != owner:
            _in_a_fork(got)
        elif got is signal.SIGINT and (asked.interrupted or asked.loading or asked.over):
            raise KeyboardInterrupt
        else:
            first, asked.name = not asked.name, asked.name or got.name
            if got is signal.SIGINT:
                asked.interrupted = True
                _say(AGAIN)
            elif asked.loading and first:
                raise Leave(f"{got.name} came before there was anything to save: the run ends")

    with handled(remember):
        yield


@contextmanager
def handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Inside, the signals that this process does not ignore come to a handler. In the main thread."""
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _in_a_fork(got: signal.Signals) -> None:
    """A worker of the data loader: its parent ends it, and a Ctrl-C of the terminal is for the parent too."""
    if got is not signal.SIGINT:
        signal.signal(got, signal.SIG_DFL)
        os.kill(os.getpid(), got)


def _say(text: str) -> None:
    """From a handler, which may have interrupted a `print`; rank 0 speaks."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"{text}\n".encode())


@contextmanager
def attending(run: Counting, progress: Progress, *, saves: bool) -> Iterator[Asked]:
    """While a run trains: its signs of life, and the signals that ask it to save and to leave.

    Args:
        run: it counts its steps.
        progress: of this process.
        saves: whether there are checkpoints; without them signals do what they did before.
    """
    with progress.of(run), listening(saves) as asked:
        asked.before_turn = Turns(asked, progress, listens=saves)
        yield asked


class Turns:
    """Called before each batch of an evaluation: a sign of life, and the place to leave it.

    Ranks go through an evaluation at their own pace, so the first that comes to a batch decides for all whether it is
    the last, and tells the others through the store that they share.

    Args:
        asked: what this process was asked.
        progress: of this process.
        listens: whether the run leaves at signals; the same on all ranks.
    """

    def __init__(self, asked: Asked, progress: Progress, *, listens: bool) -> None:
        self._asked = asked
        self._progress = progress
        self._listens = listens
        self._step = self._turn = 0

    def __call__(self) -> None:
        """Before a batch. All ranks have as many of them in an evaluation.

        Raises:
            EvaluationLeft: this batch and those after it are left out.
        """
        self._progress.beats += 1
        run = self._progress.run
        if run is None or not self._listens:
            return
        self._turn = self._turn + 1 if run.step == self._step else 1
        self._step = run.step
        if watch.agreed(f"leave/{self._step}/{self._turn}", wish=bool(self._asked.name)):
            raise EvaluationLeft(self._asked.name)
