"""Who is late, from where every rank stands; and when a thread stands still."""

from __future__ import annotations

import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import pytest

from collie_core import hang
from collie_core.hang import Monitor, Progress, Status, explain


def at(call: str, *, waits: bool = False, step: int | None = 3, still: float = 9.0, **sequences: int) -> Status:
    return Status(step, still, waits, call, f"stack of {call}\n", sequences)


def said(found: dict[int, Status], silent: Sequence[int] = ()) -> str:
    def name(ranks: Sequence[int]) -> str:
        return f"{'ranks' if len(ranks) > 1 else 'rank'} {','.join(map(str, ranks))}"

    explanation = explain(found, silent, limit_s=5, name=name)
    return "" if explanation is None else explanation.sentence


REDUCES = at("all_reduce, called at x.py:1 (f)", waits=True)


def test_the_one_for_whom_the_others_wait_is_late() -> None:
    found = dict.fromkeys((0, 1, 3), REDUCES) | {2: at("`time.sleep(60)` at y.py:2 (g)", still=2.0)}
    assert said(found) == (
        "rank 2 is late: after step 3, in `time.sleep(60)` at y.py:2 (g). ranks 0,1,3 stand still after step 3, in "
        "all_reduce, called at x.py:1 (f) (parallel.timeout_s=5)"
    )


def test_those_that_do_not_answer_are_late() -> None:
    assert said({0: REDUCES, 3: REDUCES}, [1, 2]).startswith(
        "ranks 1,2 are late: no answer, so stopped or blocked. ranks"
    )


@pytest.mark.parametrize(
    ("found", "late"),
    [
        # All wait: one has not begun what others wait in, is a step behind, or waits in something else.
        ({0: at("a", waits=True, world=7), 1: at("a", waits=True, world=7), 2: at("a", waits=True, world=6)}, "rank 2"),
        ({0: at("a", waits=True, step=4), 1: at("a", waits=True)}, "rank 1"),
        ({0: at("a", waits=True), 1: at("a", waits=True), 2: at("b", waits=True)}, "rank 2"),
        # On a GPU nobody is seen to wait: the queue of the device is full, or a number is read from it.
        (
            {0: at("`loss.item()`", world=7), 1: at("`time.sleep(9)`", world=6), 2: at("`loss.item()`", world=7)},
            "rank 1",
        ),
        # Two are busy; one of them because it waits for the other in a group of its own.
        ({0: at("a", waits=True, dp=3), 1: at("b", dp=2), 2: at("c", dp=3)}, "rank 1"),
        ({0: at("a", step=None, waits=True), 1: at("b", step=None)}, "rank 1"),
    ],
)
def test_what_else_tells_who_is_late(found: dict[int, Status], late: str) -> None:
    assert said(found).startswith(f"{late} is late: ")


def test_one_process_is_stuck_and_one_that_goes_on_is_not() -> None:
    assert said({0: at("`x`")}) == "rank 0 is stuck for parallel.timeout_s=5: after step 3, in `x`"
    assert said({0: at("`x`", still=1.0), 1: at("`y`", still=4.0)}) == ""


def test_equal_stacks_are_shown_once() -> None:
    explanation = explain({0: REDUCES, 1: at("`x`"), 2: REDUCES}, [], limit_s=5, name=lambda ranks: f"{ranks}")
    assert explanation is not None
    assert explanation.stacks.count("stack of all_reduce") == 1
    assert "--- [0, 2]:" in explanation.stacks


@pytest.fixture
def monitored() -> Iterator[tuple[Progress, threading.Event, Monitor]]:
    """This thread, which may stand still for 0.3 s."""
    progress, stuck = Progress(), threading.Event()
    monitor = Monitor(progress, 0.3, stuck.set)
    yield progress, stuck, monitor
    monitor.stop()


def test_standing_still_is_noticed_in_a_run_only(monitored: tuple[Progress, threading.Event, Monitor]) -> None:
    progress, stuck, monitor = monitored
    time.sleep(0.8)  # a run that loads may take its time
    assert not stuck.is_set()
    with progress.of(SimpleNamespace(step=4)):
        time.sleep(0.8)
        assert stuck.is_set()
        found = monitor.status()
        assert found.step == 4
    assert not found.waits


def test_steps_and_signs_of_life_are_progress(monitored: tuple[Progress, threading.Event, Monitor]) -> None:
    progress, stuck, _ = monitored
    run = SimpleNamespace(step=0)
    with progress.of(run):
        for beat in range(16):  # always seen in the same place
            time.sleep(0.05)
            run.step, progress.beats = beat % 2, beat
    assert not stuck.is_set()


def test_waiting_for_others_is_noticed_while_a_run_loads_too() -> None:
    """In a collective, by where the code of it lies."""
    stuck = threading.Event()
    code = "import time\ndef all_reduce(): time.sleep(1.5)\n"
    exec(compile(code, "/x/torch/distributed/distributed_c10d.py", "exec"), library := {})  # type: ignore[var-annotated]
    thread = threading.Thread(target=lambda: library["all_reduce"]())
    thread.start()
    monitor = Monitor(Progress(thread=thread.ident or 0), 0.3, stuck.set)
    assert stuck.wait(1.4)
    found = monitor.status()
    monitor.stop()
    thread.join()
    assert found.waits
    assert re.match(r"all_reduce, called at \S*test_hang\.py:\d+ ", found.call)


def test_a_call_is_told_as_one_finds_it() -> None:
    here, place = threading.Event(), threading.Event()

    def stand() -> None:
        here.set()
        place.wait(5)

    thread = threading.Thread(target=stand)
    thread.start()
    here.wait()
    time.sleep(0.05)
    found = hang.status(Progress(thread=thread.ident or 0), 0.0)
    place.set()
    thread.join()
    assert "place.wait(5)" in found.stack
    assert "threading.py:" in found.call


def test_a_thread_is_found_where_python_itself_sees_it() -> None:
    """Without taking its frames, of which one may be gone when it moves on; also in a file of any name."""
    here, place = threading.Event(), threading.Event()
    code = "def größe(here, place):\n    here.set()\n    place.wait(5)\n"
    exec(compile(code, "/lieux d'été/出力 \N{ROCKET}.py", "exec"), library := {})  # type: ignore[var-annotated]
    thread = threading.Thread(target=library["größe"], args=(here, place))
    thread.start()
    here.wait()
    time.sleep(0.05)
    own = traceback.extract_stack(sys._current_frames()[thread.ident or 0])
    found = hang._stack(thread.ident or 0)
    place.set()
    thread.join()
    assert [(call.filename, call.lineno, call.name) for call in found] == [
        (call.filename, call.lineno, call.name) for call in own
    ]
    assert any("\N{ROCKET}" in call.filename and call.name == "größe" for call in found)
