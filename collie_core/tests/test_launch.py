"""Which processes a run starts, and what it understands of launchers that have started them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from collie_core import launch
from collie_core.api import RunConfig
from collie_core.checkpoint.signals import Leave
from collie_core.errors import DataError, RunError
from collie_core.hub import Fault
from collie_core.report.rundir import CONFIG, HEADER

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_ERROR_FILE", launch.OURS)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "die_with_parent", lambda: None)  # nor when the thread that started pytest ends
    for name in (*LAUNCHER, "SLURM_STEP_NUM_TASKS", "TORCHELASTIC_RESTART_COUNT"):
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


def left_by(error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, dict[str, Any]]:
    """Exit code and reason of a rank that our launcher has started, before it has met the others."""
    ended: list[int] = []
    monkeypatch.setattr(launch.os, "_exit", ended.append)
    monkeypatch.setattr(launch, "Watch", None)  # nobody is there
    for name, value in {launch.OURS: "1", "RANK": "0", "TORCHELASTIC_ERROR_FILE": str(tmp_path / "x")}.items():
        monkeypatch.setenv(name, value)
    with launch.reported_to_launcher():
        raise error
    message = json.loads((tmp_path / "x").read_text())["message"]
    return ended[0], {**message["extraInfo"], "message": message["message"]}


@pytest.mark.parametrize(
    ("error", "code", "mends"),
    [
        (DataError("rows.jsonl:3: this is not JSON"), 2, False),
        (RunError("the loss is not a number"), 1, False),
        (Fault("rank 1 cannot reach rank 0"), 1, True),
        (KeyError("lost"), 1, True),
        (KeyboardInterrupt(), 130, False),
        (Leave("SIGTERM came"), 0, False),
    ],
)
def test_a_rank_tells_why_it_ends_and_whether_a_restart_may_help(
    error: BaseException, code: int, mends: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, reason = left_by(error, tmp_path, monkeypatch)
    assert (found, reason["mends"], reason["about"]) == (code, mends, None)
    assert ("Traceback" in reason["details"]) == isinstance(error, (KeyError, KeyboardInterrupt))
    assert str(error) in reason["message"]


def test_a_restarted_run_goes_on_from_its_own_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def changes(resume: str | None, save_steps: int | None = 2) -> list[str]:
        checkpoint = {"save_steps": save_steps, "resume_from_checkpoint": resume}
        return launch.restart_overrides(RunConfig(train={"output_dir": str(tmp_path)}, checkpoint=checkpoint))

    assert changes(None) == []  # this is the first start
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert changes(None) == ["checkpoint.resume_from_checkpoint=auto"]
    assert changes(None, save_steps=None) == []
    assert changes("another/run") == []
    (tmp_path / CONFIG).write_text(HEADER)
    assert changes("another/run") == ["train.overwrite_output_dir=true"]
    (tmp_path / "checkpoints" / "step-00000002").mkdir(parents=True)
    assert changes("another/run") == ["checkpoint.resume_from_checkpoint=auto"]


def test_another_launcher_does_its_own_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(RunError, match="tell it to restart them"):
        launch.processes_to_start(None, restarts=2)


def test_without_a_launcher_an_error_passes() -> None:
    with pytest.raises(DataError), launch.reported_to_launcher():
        raise DataError("x")
