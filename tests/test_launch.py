"""`collie train --nproc N`: the same numbers as one process, and one sentence when a rank fails."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from combos import in_everything, more
from fake_dists import write_distribution

from collie_core.api import RunError, Topology
from collie_core.config.parallel import ParallelConfig
from collie_core.watch import GRACE_S, watching
from collie_testkit.zygote import RanksFailed

FAULTS = """
import os, signal, time
from collie_core.api import RunError, hookimpl

@hookimpl
def collie_after_step(run):
    fault = os.environ.get("FAULT", "")
    if run.step == 2 and run.topology.rank == 1:
        if fault == "error":
            raise RunError("the cable of rank one is cut")
        if fault == "bug":
            raise ZeroDivisionError("a bug of rank one")
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
    if fault == "slow":
        time.sleep(0.5)
"""


@pytest.fixture
def run_file(tiny_llama: Path, instructions: Path, tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    sections = {
        "model": {"model_name_or_path": str(tiny_llama)},
        "data": {"train": str(instructions), "max_length": 128, "cache_dir": str(tmp_path / "cache")},
        "train": {"max_steps": 4, "global_batch_size": 8, "output_dir": str(tmp_path / "run")},
        "optimizer": {"type": "adamw", "lr": 1e-3},
    }
    path.write_text(yaml.safe_dump(sections))
    return path


@pytest.fixture
def faults(tmp_path: Path) -> Path:
    """A hooks plugin on the path that fails on rank 1 as the variable FAULT says."""
    site = tmp_path / "site"
    hooks = {"collie.hooks": {"faults": "collie_faults"}}
    write_distribution(site, "collie-faults", groups=hooks, files={"collie_faults.py": FAULTS})
    return site


def command(run_file: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "collie_core.cli", "train", str(run_file), *more]


def environment(**more: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return clean | {"OMP_NUM_THREADS": "1"} | more


def collie(run_file: Path, *more: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(run_file, *more), env=environment(**variables), capture_output=True, text=True, timeout=200, check=False
    )


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_give_the_losses_of_one(run_file: Path, tmp_path: Path) -> None:
    for processes in (1, 2):
        done = collie(run_file, "--nproc", str(processes), f"train.output_dir={tmp_path / str(processes)}")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("step 4/4") == 1  # one process talks
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert len(one) == len(two) == 4
    assert max(abs(first - second) for first, second in zip(one, two, strict=True)) <= 1e-5


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("error", "rank 1 of 2 failed: the cable of rank one is cut"),
        more("bug", "ZeroDivisionError: a bug of rank one"),
        ("kill", "rank 1 of 2 was ended by SIGKILL"),
    ],
)
def test_a_rank_that_fails_ends_all_with_its_reason(fault: str, said: str, run_file: Path, faults: Path) -> None:
    began = time.monotonic()
    done = collie(run_file, "--nproc", "2", PYTHONPATH=str(faults), FAULT=fault)
    assert done.returncode == 1
    assert said in done.stderr
    assert done.stderr.count("rank 1 of 2") == 1
    assert ("Traceback" in done.stderr) == (fault == "bug")
    assert time.monotonic() - began < 90  # starting two processes takes most of it


def test_a_mistake_is_told_once_and_before_any_process_starts(run_file: Path) -> None:
    done = collie(run_file, "--nproc", "2", "train.max_stepz=3")
    assert done.returncode == 2
    assert done.stderr.count("max_stepz") == 1
    wrong_size = collie(run_file, "--nproc", "2", "parallel.data_parallel_size=4")
    assert wrong_size.returncode == 1
    assert "data_parallel_size=4 needs 4 processes, but 2 were started" in wrong_size.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="a parent's death is told to its children on Linux only")
def test_a_killed_launcher_leaves_no_orphans(run_file: Path, faults: Path) -> None:
    process = subprocess.Popen(
        command(run_file, "--nproc", "2", "train.max_steps=1000"),
        env=environment(PYTHONPATH=str(faults), FAULT="slow"),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "step 1/" in line:
            break
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []


def test_under_another_launcher_nproc_is_refused(run_file: Path) -> None:
    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    done = subprocess.run(
        command(run_file, "--nproc", "2"),
        env=environment() | variables,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 1
    assert "a launcher has started the processes already" in done.stderr


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("error", "rank 1 of 2 on {host} failed: the cable of rank one is cut"),
        more("bug", "rank 1 of 2 on {host} failed: ZeroDivisionError: a bug of rank one"),
        more("kill", "rank 1 of 2 on {host} is gone: its process ended without giving a reason"),
    ],
)
def test_under_torchrun_one_process_tells_why_all_end(fault: str, said: str, run_file: Path, faults: Path) -> None:
    scripts = Path(sys.executable).parent
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python"]
    done = subprocess.run(
        [*torchrun, str(scripts / "collie"), "train", str(run_file)],
        env=environment(PYTHONPATH=str(faults), FAULT=fault),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 1
    ours, _, _ = done.stderr.partition("torch/distributed/elastic/multiprocessing/api.py")  # what torchrun says
    expected = said.format(host=socket.gethostname())
    told = [line for line in ours.splitlines() if line.startswith(expected)]
    # Of a killed rank torchrun may hear first, and end the process that would have told.
    assert len(told) == 1 or (fault == "kill" and "Signal 9 (SIGKILL)" in done.stderr), done.stderr
    assert ("Traceback" in ours) == (fault == "bug")


def watched(fault: str) -> float:
    """How long this rank of somebody's own program took, where one of two raises and the other waits for it."""
    topology = Topology.start(ParallelConfig())
    began = time.monotonic()
    try:
        with watching(topology, 1800.0):
            topology.barrier()
            if fault == "all" or topology.rank == 1:
                raise RunError("no such luck")
            time.sleep(60)
    except RunError:
        if fault == "one":
            time.sleep(2 * GRACE_S)  # the program has more to do
    return time.monotonic() - began


def test_in_a_program_of_ones_own_a_rank_that_raises_ends_the_others(zygote: Any) -> None:
    with pytest.raises(RanksFailed, match=r"rank 1 of 2 on .* failed: no such luck"):
        zygote.run(__file__, "watched", world_size=2, args=("one",))


def test_ranks_that_all_raise_are_left_to_their_program(zygote: Any) -> None:
    assert max(zygote.run(__file__, "watched", world_size=2, args=("all",))) < GRACE_S
    assert len(zygote.run(__file__, "watched_twice", world_size=2)) == 2


def watched_twice() -> None:
    """Two trainings in one program."""
    topology = Topology.start(ParallelConfig())
    for _ in range(2):
        with watching(topology, 1800.0), watching(topology, 1800.0):
            topology.barrier()


@in_everything
def test_sizes_alone_start_their_processes_and_evaluation_takes_the_same_run_file(
    run_file: Path, instructions: Path
) -> None:
    def evaluated(*more: str) -> dict[str, float]:
        arguments = ["eval", str(run_file), f"data.eval={instructions}", "--json", *more]
        done = subprocess.run(
            [sys.executable, "-m", "collie_core.cli", *arguments],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        (line,) = done.stdout.splitlines()  # one process talks
        results: dict[str, float] = json.loads(line)
        return results

    whole = evaluated()
    assert evaluated("parallel.tensor_parallel_size=2") == pytest.approx(whole, rel=1e-5)
    assert evaluated("parallel.pipeline_parallel_size=2", "--nproc", "2") == pytest.approx(whole, rel=1e-5)
