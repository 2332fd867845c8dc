"""SIGTERM and SIGUSR1 ask a run to save and to leave at the end of its step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Asked:
    """Which signal this process has got; "" while there is none."""

    name = ""


@contextmanager
def listening(active: bool) -> Iterator[Asked]:
    """Inside, a first SIGTERM or SIGUSR1 is remembered; a second one does what it did before.

    Without `active`, or in another thread than the main one, where Python allows no handlers, nothing changes.
    """
    asked = Asked()
    if not active or threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def remember(number: int, frame: FrameType | None) -> None:
        got = signal.Signals(number)
        asked.name = got.name
        signal.signal(got, before[got])

    before = {number: signal.signal(number, remember) for number in SIGNALS}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
