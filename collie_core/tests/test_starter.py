"""Processes that are started here, with fake ranks: failures, restarts, and signals that pass through."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from collie_core import starter
from collie_core.api import RunConfig
from collie_core.errors import ConfigError, RunError

RANK = """
import json, os, signal, sys, time
rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
def fail(message, code=1, details="", mends=True, about=None, at=0.0):
    extra = {"time": at or time.time(), "details": details, "mends": mends, "about": about}
    with open(os.environ["TORCHELASTIC_ERROR_FILE"], "w") as file:
        json.dump({"message": {"message": message, "extraInfo": extra}}, file)
    os._exit(code)
def wait_for(signal_number, then):
    got = []
    signal.signal(signal_number, lambda *_: got.append(1))
    folder = os.path.dirname(os.environ["TORCHELASTIC_ERROR_FILE"])
    open(folder + "/ready-" + str(rank), "w").close()
    if rank == 0:
        while not os.path.exists(folder + "/ready-1"): time.sleep(0.01)
        os.kill(os.getppid(), signal_number)
    while not got: time.sleep(0.01)
    then()
"""


@pytest.fixture(autouse=True)
def fake_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The argument of a rank is what it does, in Python."""
    monkeypatch.setattr(starter, "_command", lambda arguments: [sys.executable, "-S", "-c", RANK + arguments[0]])
    monkeypatch.setattr(starter, "SETTLE_S", 0.5)


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., RunConfig]:
    def make(save_steps: int | None = 2, timeout_s: float = 20) -> RunConfig:
        return RunConfig(
            model={"model_name_or_path": "x"},
            data={"train": "x"},
            train={"output_dir": str(tmp_path / "run")},
            checkpoint={"save_steps": save_steps},
            parallel={"timeout_s": timeout_s},
        )

    return make


def failing(code: str, processes: int = 3, config: RunConfig | None = None, restarts: int = 0) -> RunError:
    with pytest.raises(RunError) as error:
        starter.start(processes, [code], config, max_restarts=restarts)
    return error.value


def test_the_first_reason_is_told_and_its_echoes_are_not() -> None:
    """Rank 0 hears of rank 1 before rank 1 has left, rank 2 would wait for ever."""
    code = """
if rank == 0: fail("rank 1 of 3 on here failed: rows.jsonl:3: this is not JSON", about=1, at=1.0)
if rank == 1: time.sleep(0.2); fail("rows.jsonl:3: this is not JSON", code=2, at=2.0)
time.sleep(60)"""
    error = failing(code)
    assert str(error) == "rank 1 of 3 failed: rows.jsonl:3: this is not JSON"
    assert error.exit_code == 2


def test_a_bug_is_told_with_its_traceback_and_a_kill_by_its_signal() -> None:
    assert str(failing('fail("KeyError: lost", details="Traceback ...")', 1)) == "Traceback ...\nKeyError: lost"
    killed = 'os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else fail("ConnectionError: reset by peer")'
    assert str(failing(killed)) == "rank 1 of 3 was ended by SIGKILL; the system may have run out of memory"
    assert str(failing("os._exit(3 * (rank == 1))", 2)) == "rank 1 of 2 ended with exit code 3 and gave no reason"


def checkpoint(step: str) -> str:
    """Code by which rank 0 leaves a checkpoint, of which the name is enough here."""
    return f'rank or os.makedirs(sys.path[0] + f"/run/checkpoints/step-{{{step}:08d}}", exist_ok=True)\n'


@pytest.fixture
def here(tmp_path: Path) -> str:
    return f"sys.path[0] = {str(tmp_path)!r}\n"


def test_all_start_again_from_the_last_checkpoint(
    config: Callable[..., RunConfig], here: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = here + "if attempt == 0: fail('no one answers') if rank else time.sleep(60)\n"
    code += (
        checkpoint("2 * attempt") + "if attempt < 3: os.kill(os.getpid(), signal.SIGSEGV) if rank else time.sleep(60)"
    )
    assert starter.start(2, [code], config(), max_restarts=3) == 0
    assert capsys.readouterr().err.splitlines() == [
        "restart 1 of 3: rank 1 of 2 failed: no one answers; the run begins again, since it has saved no checkpoint",
        "restart 2 of 3: rank 1 of 2 was ended by SIGSEGV; the run goes on from step-00000002",
        "restart 3 of 3: rank 1 of 2 was ended by SIGSEGV; the run goes on from step-00000004",
    ]


def test_restarts_come_to_an_end_and_tell_that_they_were_in_vain(
    config: Callable[..., RunConfig], here: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = here + checkpoint("2") + "os.kill(os.getpid(), signal.SIGKILL)"
    error = failing(code, 1, config(), restarts=2)
    first, last = str(error).splitlines()
    assert first == "the process was ended by SIGKILL; the system may have run out of memory"
    said = "no restart is left of --max-restarts 2; the last 2 saved no checkpoint beyond where they began"
    assert last == said
    assert error.exit_code == 1
    line = capsys.readouterr().err.splitlines()[1]
    assert line.startswith("restart 2 of 2:")
    assert line.endswith("goes on from step-00000002, as the last time")


@pytest.mark.parametrize(("code", "exit_code"), [('fail("no", code=2)', 2), ('fail("no", mends=False)', 1)])
def test_what_would_come_again_is_not_restarted(
    code: str, exit_code: int, config: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    mends = code.replace("code=2", "code=2, mends=False")
    assert failing(mends, 2, config(), restarts=3).exit_code == exit_code
    assert "restart" not in capsys.readouterr().err


def test_restarts_need_checkpoints_and_a_folder_of_their_own(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.save_steps.*starts a run again from its last checkpoint"):
        starter.start(2, [""], config(save_steps=None), max_restarts=1)
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("another run")
    with pytest.raises(RunError, match="run"):
        starter.start(2, [""], config(), max_restarts=1)


def test_a_signal_goes_to_all_ranks_and_causes_no_restart(
    config: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    leaving = "wait_for(signal.SIGUSR1, lambda: (time.sleep(1), os._exit(0)))"  # longer than SETTLE_S
    assert starter.start(2, [leaving], config(), max_restarts=2) == 0
    failing_late = "wait_for(signal.SIGTERM, lambda: fail('the disk is full'))"
    assert "the disk is full" in str(failing(failing_late, 2, config(), restarts=2))
    too_slow = "wait_for(signal.SIGTERM, lambda: time.sleep(60))"
    said = "SIGTERM came, and the ranks did not leave within parallel.timeout_s=0.5"
    assert str(failing(too_slow, 2, config(timeout_s=0.5), restarts=2)) == said
    assert starter.start(2, ["os.kill(os.getppid(), signal.SIGTERM) if rank else None; time.sleep(60)"], config()) == 0
    assert capsys.readouterr().err == "SIGTERM came before there was anything to save: the run ends\n"
    assert signal.getsignal(signal.SIGUSR1) is before


def test_without_checkpoints_signals_end_the_ranks(config: Callable[..., RunConfig]) -> None:
    asks = "os.kill(os.getppid(), signal.{}) if rank else None; time.sleep(60)"
    assert starter.start(2, [asks.format("SIGTERM")], config(save_steps=None)) == 128 + signal.SIGTERM
    with pytest.raises(KeyboardInterrupt):
        starter.start(2, [asks.format("SIGINT")])


def test_a_second_ctrl_c_ends_all_at_once(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    code = f"""
open({str(tmp_path)!r} + f"/{{os.getpid()}}", "w")
signal.signal(signal.SIGINT, signal.SIG_IGN)
if rank: time.sleep(0.3); os.kill(os.getppid(), signal.SIGINT); time.sleep(0.3); os.kill(os.getppid(), signal.SIGINT)
time.sleep(60)"""
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        starter.start(2, [code], config())
    assert time.monotonic() - began < 20
    for path in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.name), 0)


def test_ranks_are_told_where_they_are(capfd: pytest.CaptureFixture[str]) -> None:
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", starter.OURS]
    code = f"found = [os.environ[name] for name in {names}] + [str('COLLIE_STORE_FD' in os.environ)]\n"
    code += "os.write(1, (' '.join(found) + '\\n').encode())"
    assert starter.start(2, [code]) == 0
    found: Any = sorted(capfd.readouterr().out.splitlines())
    assert found == ["0 2 0 2 127.0.0.1 1 True", "1 2 1 2 127.0.0.1 1 False"]
