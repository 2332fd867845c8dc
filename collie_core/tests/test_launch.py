"""Which processes a run starts, and what it understands of launchers that have started them."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from collie_core import launch
from collie_core.errors import DataError, RunError

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_ERROR_FILE", launch.OURS)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_die_with_parent", lambda: None)  # nor when the thread that started pytest ends
    for name in (*LAUNCHER, "SLURM_STEP_NUM_TASKS"):
        monkeypatch.setenv(name, "x")  # so that what a test sets is taken back
        monkeypatch.delenv(name)


def test_one_process_per_gpu_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert launch.processes_to_start(None) == 4
    assert launch.processes_to_start(2) == 2
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert launch.processes_to_start(None) == 1


def test_under_torchrun_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    assert launch.processes_to_start(None) == 1
    with pytest.raises(RunError, match="leave --nproc out"):
        launch.processes_to_start(2)


def test_srun_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$3" = "gpu-[01-02]" ] && printf "gpu-01\\ngpu-02\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    step = {"NUM_TASKS": "16", "NODELIST": "gpu-[01-02]"}
    for name, value in {**{f"STEP_{key}": value for key, value in step.items()}, "PROCID": "9", "LOCALID": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_JOB_ID", "123456")
    assert launch.processes_to_start(None) == 1
    import os

    found = {name: os.environ[name] for name in LAUNCHER[:5]}
    assert found == {
        "RANK": "9",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu-01",
        "MASTER_PORT": str(20000 + 123456 % 20000),
    }


def test_a_batch_script_without_srun_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "16")  # what sbatch sets for the script itself
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert launch.processes_to_start(1) == 1


def failure(exitcode: int, reason: dict[str, Any] | None, timestamp: int = 0) -> Any:
    return SimpleNamespace(exitcode=exitcode, error_file_data=reason or {"message": "<none>"}, timestamp=timestamp)


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception, float], dict[str, Any]]:
    """What a rank leaves behind that fails at a time."""

    def leave(error: Exception, at: float) -> dict[str, Any]:
        ended: list[int] = []
        monkeypatch.setattr("collie_core.watch.time.time", lambda: at)
        monkeypatch.setattr(launch.os, "_exit", ended.append)
        for name, value in {launch.OURS: "1", "RANK": "0", "TORCHELASTIC_ERROR_FILE": str(tmp_path / "x")}.items():
            monkeypatch.setenv(name, value)
        with launch.reported_to_launcher():
            raise error
        assert ended == [1]
        record: dict[str, Any] = json.loads((tmp_path / "x").read_text())
        return record

    return leave


def test_the_first_reason_is_told_and_its_echoes_are_not(
    written: Callable[[Exception, float], dict[str, Any]],
) -> None:
    """Within one second: rank 0 hears of the lost rank 1 a moment later, and rank 2 is ended by the launcher."""
    failures = {
        0: failure(1, written(ConnectionError("reset by peer"), 100.6)),
        1: failure(1, written(DataError("rows.jsonl:3: this is not JSON"), 100.2)),
        2: failure(-signal.SIGTERM, None, timestamp=99),
    }
    reason = launch._first_reason(SimpleNamespace(failures=failures), 3)  # type: ignore[arg-type]
    assert reason == "rank 1 of 3 failed: rows.jsonl:3: this is not JSON"


def test_a_bug_is_told_with_its_traceback_and_a_kill_by_its_signal(
    written: Callable[[Exception, float], dict[str, Any]],
) -> None:
    bug = {0: failure(1, written(KeyError("lost"), 1.0))}
    assert "Traceback" in launch._first_reason(SimpleNamespace(failures=bug), 2)  # type: ignore[arg-type]
    killed = {1: failure(-signal.SIGKILL, None)}
    said = launch._first_reason(SimpleNamespace(failures=killed), 2)  # type: ignore[arg-type]
    assert said == "rank 1 of 2 was ended by SIGKILL; the system may have run out of memory"
    silent = {1: failure(3, None)}
    said = launch._first_reason(SimpleNamespace(failures=silent), 2)  # type: ignore[arg-type]
    assert said == "rank 1 of 2 ended with exit code 3 and gave no reason"


def test_without_a_launcher_an_error_passes() -> None:
    with pytest.raises(DataError), launch.reported_to_launcher():
        raise DataError("x")
