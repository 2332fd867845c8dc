"""Signals that ask a run to leave: only inside, only on the main thread, and at once when there is nothing to save."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from collie_core.checkpoint.signals import SIGNALS, Leave, listening


def test_the_first_is_remembered_and_those_after_it_change_nothing() -> None:
    got: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: got.append(number))
    try:
        with listening(True) as asked:
            assert asked.name == ""
            os.kill(os.getpid(), signal.SIGUSR1)
            assert (asked.name, got) == ("SIGUSR1", [])
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGTERM)
            assert (asked.name, got) == ("SIGUSR1", [])
        os.kill(os.getpid(), signal.SIGUSR1)
        assert len(got) == 1
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_second_ctrl_c_interrupts(capfd: pytest.CaptureFixture[str]) -> None:
    with listening(True) as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert asked.name == "SIGINT"
        assert capfd.readouterr().err == "saving at the end of this step; press Ctrl-C again to leave at once\n"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_while_a_run_loads_it_leaves_at_once() -> None:
    with listening(True, loading=True):
        with pytest.raises(Leave, match="SIGTERM came before there was anything to save"):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # of the scheduler and of the launcher: once is enough
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with listening(True, loading=True) as outer:
        with listening(True) as asked:
            assert asked is outer
            os.kill(os.getpid(), signal.SIGTERM)
            assert asked.name == "SIGTERM"
        os.kill(os.getpid(), signal.SIGTERM)  # all is saved, and the run ends anyway
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_worker_of_the_data_loader_ends_as_ever() -> None:
    with listening(True) as asked:
        for number, expected in ((signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 7)):
            pid = os.fork()
            if pid == 0:
                os.kill(os.getpid(), number)
                os._exit(7)
            _, status = os.waitpid(pid, 0)
            assert os.waitstatus_to_exitcode(status) == expected
        assert asked.name == ""


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with listening(True) as asked:
            os.kill(os.getpid(), signal.SIGINT)
            assert asked.name == ""
    finally:
        signal.signal(signal.SIGINT, before)


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
