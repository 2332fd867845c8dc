"""Signals that ask a run to leave: only inside, only once, only on the main thread."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from collie_core.checkpoint.signals import SIGNALS, listening


def test_the_first_is_remembered_and_the_second_does_what_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: got.append(number))
    try:
        with listening(True) as asked:
            assert asked.name == ""
            os.kill(os.getpid(), signal.SIGUSR1)
            assert (asked.name, got) == ("SIGUSR1", [])
            os.kill(os.getpid(), signal.SIGUSR1)
            assert got == [signal.SIGUSR1]
        os.kill(os.getpid(), signal.SIGUSR1)
        assert len(got) == 2
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_nothing_changes_in_another_thread_or_unasked() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    found: list[object] = []

    def enter() -> None:
        with listening(True):
            found.extend(signal.getsignal(number) for number in SIGNALS)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    with listening(False):
        found.extend(signal.getsignal(number) for number in SIGNALS)
    assert found == before * 2
