"""The job for Slurm, with stand-ins for what is not here. The other examples are run by docs/examples.md."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "slurm.sh"
SRUN = """#!/bin/sh
[ "$1" = --kill-on-bad-exit=1 ] || exit 64
shift
exec "$@"
"""
COLLIE = """#!/bin/sh
echo "$@" > arguments
mkdir -p runs/mine
printf '{\\n  "outcome": "%s",\\n' "$OUTCOME" > runs/mine/summary.json
"""


@pytest.mark.parametrize(
    ("outcome", "again"),
    [
        ("stopped early: SIGUSR1 asked for it; go on with checkpoint.resume_from_checkpoint=auto", True),
        ("stopped early: no better eval/loss", False),
        ("finished", False),
    ],
)
def test_a_job_that_ran_out_of_time_is_put_back(outcome: str, again: bool, tmp_path: Path) -> None:
    for name, text in (("srun", SRUN), ("collie", COLLIE), ("scontrol", '#!/bin/sh\necho "$@" > requeued\n')):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "SLURM_JOB_ID": "7", "OUTCOME": outcome}
    command = ["bash", str(SCRIPT), "run.yaml", "runs/mine", "optimizer.lr=1e-5"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    asked = (tmp_path / "arguments").read_text().split()
    assert asked[:3] == ["train", "run.yaml", "train.output_dir=runs/mine"]
    assert {"checkpoint.resume_from_checkpoint=auto", "optimizer.lr=1e-5"} <= {*asked}
    requeued = tmp_path / "requeued"
    assert (requeued.read_text() if requeued.exists() else "") == ("requeue 7\n" if again else "")
