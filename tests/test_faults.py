"""Faults and signals: a run that loses a rank starts again, one that hangs is found, one that is to leave saves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from combos import more
from fake_dists import write_distribution

from collie_core import launch
from collie_core.api import RunConfig, Trainer
from collie_core.checkpoint import files
from collie_core.checkpoint.run import Checkpoints
from collie_core.checkpoint.signals import Turns
from collie_core.cli import main
from collie_testkit.zygote import RanksFailed

pytestmark = pytest.mark.timeout(400)

Sections = dict[str, dict[str, Any]]
FAULTS = """
import os, signal, time
from collie_core.api import hookimpl

@hookimpl
def collie_after_step(run):
    again = os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"
    if run.step == 3 and run.topology.rank == 1 and not again:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.3 * again)
"""


@pytest.fixture
def own(tiny_llama: Path, instructions: Path, tmp_path: Path) -> Sections:
    """Eight steps, a checkpoint after every second, and an evaluation after every fourth, of twenty batches."""
    return {
        "model": {"model_name_or_path": str(tiny_llama)},
        "data": {
            "train": str(instructions),
            "eval": str(instructions),
            "max_length": 128,
            "cache_dir": str(tmp_path / "cache"),
        },
        "train": {"max_steps": 8, "global_batch_size": 8, "output_dir": str(tmp_path / "run")},
        "evaluation": {"steps": 4, "per_device_eval_batch_size": 1},
        "checkpoint": {"save_steps": 2, "resume_from_checkpoint": "auto"},
        "optimizer": {"type": "adamw", "lr": 1e-3},
    }


def rows(folder: Path) -> list[dict[str, Any]]:
    """What was recorded, without what is measured."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "epoch", "loss", "grad_norm", "learning_rate", "eval/loss")
    return [{key: row[key] for key in kept if key in row} for row in found]


def elsewhere(own: Sections, folder: Path) -> Sections:
    return {**own, "train": {**own["train"], "output_dir": str(folder)}}


# -- signals ----------------------------------------------------------------------------------------------------------


def asked_to_leave(own: Sections, uninterrupted: Path) -> dict[str, Any]:
    """A run that nothing stops, and one in three parts: rank 1 gets a signal in an evaluation, rank 0 in a save."""
    Trainer(RunConfig(**elsewhere(own, uninterrupted))).train()
    seen: dict[str, Any] = {}
    turn, save, turns = Turns.__call__, Checkpoints.save, 0

    def signal_in_turn(self: Turns) -> None:
        nonlocal turns
        turns += 1
        if turns == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        turn(self)

    def signal_in_save(self: Checkpoints, *args: Any) -> None:
        if args[0].step == 6 and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGUSR1)
        save(self, *args)

    def part() -> str:
        trainer = Trainer(RunConfig(**own))
        trainer.train()
        return f"step {trainer.run.step}: {trainer.run.stop_reason.partition(';')[0]}"

    Turns.__call__ = signal_in_turn  # type: ignore[method-assign]
    seen["evaluating"] = part()
    seen["turns"] = turns
    Turns.__call__, Checkpoints.save = turn, signal_in_save  # type: ignore[method-assign]
    seen["saving"] = part()
    seen["exported"] = Path(own["train"]["output_dir"], "model").exists()
    Checkpoints.save = save  # type: ignore[method-assign]
    seen["done"] = part()
    return seen


@pytest.mark.filterwarnings("ignore")  # DeepSpeed calls collectives that torch deprecates
@pytest.mark.parametrize("sizes", [{}, more({"pipeline_parallel_size": 2}), more({"zero_stage": 3})])
def test_a_signal_in_an_evaluation_or_a_save_loses_nothing(
    sizes: dict[str, int], own: Sections, zygote: Any, tmp_path: Path
) -> None:
    own["parallel"] = sizes
    everyone = zygote.run(__file__, "asked_to_leave", world_size=2, args=(own, tmp_path / "whole"), limit_s=90)
    for seen in everyone:
        assert seen["evaluating"] == "step 4: SIGTERM asked for it"
        assert 3 <= seen["turns"] <= 10  # of 20: the other rank hears of it before its next batch or the one after
        assert seen["saving"] == "step 6: SIGUSR1 asked for it"
        assert not seen["exported"]
        assert seen["done"] == "step 8: "
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    assert [row["step"] for row in rows(tmp_path / "run") if "eval/loss" in row] == [4, 8]
    assert (tmp_path / "run" / "model").is_dir()


@pytest.mark.parametrize(("where", "resumed"), [("tokenizer", False), ("restore", True)])
def test_a_signal_while_it_loads_leaves_at_once(
    where: str,
    resumed: bool,
    own: Sections,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    own["evaluation"]["steps"] = None
    own["train"]["max_steps"] = 2
    if resumed:
        Trainer(RunConfig(**own)).train()
        own["train"]["max_steps"] = 3
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(own))

    def asked(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("it went on")

    with monkeypatch.context() as patch:
        owner = {"tokenizer": "collie_core.parts.build_tokenizer", "restore": "collie_core.checkpoint.run.Checkpoints"}
        patch.setattr(owner[where] + (".restore" if resumed else ""), asked)
        assert main(["train", str(tmp_path / "run.yaml"), "--nproc", "1"]) == 0
    assert "SIGTERM came before there was anything to save: the run ends\n" in capsys.readouterr().err
    assert (tmp_path / "run").exists() == resumed
    assert main(["train", str(tmp_path / "run.yaml"), "--nproc", "1"]) == 0
    assert rows(tmp_path / "run")[-1]["step"] == own["train"]["max_steps"]


# -- ranks that hang --------------------------------------------------------------------------------------------------


class Hangs:
    """After step 3 a rank stands still."""

    def __init__(self, how: str, rank: int) -> None:
        self.how = how
        self.rank = rank

    def collie_after_step(self, run: Any) -> None:
        if run.step == 3 and run.topology.rank == self.rank:
            if self.how == "sleeps":
                time.sleep(100)
            os.kill(os.getpid(), signal.SIGSTOP)


def hanging(own: Sections, how: str, rank: int) -> None:
    """As `collie train` does it under srun."""
    with launch.reported_to_launcher() as agree:
        agree({})
        Trainer(RunConfig(**own), callbacks=[Hangs(how, rank)], observers=()).train()


@pytest.mark.parametrize(
    ("how", "rank", "said"),
    [
        (
            "sleeps",
            1,
            r"rank 1 of 2 on \S+ is late: after step 3, in `time\.sleep\(100\)` at \S*test_faults\.py:\d+ \(",
        ),
        more("is stopped", 1, r"rank 1 of 2 on \S+ is late: no answer, so stopped or blocked"),
        ("is stopped", 0, r"rank 0 of 2 on \S+ is late: no answer, so stopped or blocked"),
    ],
    ids=["rank 1 sleeps", "rank 1 is stopped", "rank 0 is stopped"],
)
def test_a_rank_that_hangs_is_named_with_its_call(how: str, rank: int, said: str, own: Sections, zygote: Any) -> None:
    own |= {"parallel": {"timeout_s": 2}, "checkpoint": {}}
    waits = rf"rank {1 - rank} of 2 on \S+ stands still after step 3, in all_reduce, called at \S+:\d+ \(\w+\) "
    with pytest.raises(RanksFailed, match=rf"{said}.*\. {waits}\(parallel\.timeout_s=2\)") as failed:
        zygote.run(__file__, "hanging", world_size=2, args=(own, how, rank), limit_s=60)
    told = str(failed.value)
    assert told.count(" is late: ") == 1
    assert f"--- rank {1 - rank} of 2 on" in told
    assert (f"--- rank {rank} of 2 on" in told) == (how == "sleeps")


# -- the launcher -----------------------------------------------------------------------------------------------------


@pytest.fixture
def job(own: Sections, tmp_path: Path) -> tuple[list[str], dict[str, str]]:
    """Arguments and environment of a run whose rank 1 is killed after step 3, in its first start."""
    own["checkpoint"]["resume_from_checkpoint"] = None
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(own))
    hooks = {"collie.hooks": {"faults": "collie_faults"}}
    write_distribution(tmp_path / "site", "collie-faults", groups=hooks, files={"collie_faults.py": FAULTS})
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    clean = {name: value for name, value in os.environ.items() if name not in launchers}
    return ["train", str(tmp_path / "run.yaml")], clean | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(tmp_path / "site"),
        "PYTHONUNBUFFERED": "1",
    }


def whole(own: Sections, folder: Path) -> None:
    Trainer(RunConfig(**elsewhere(own, folder))).train()


def test_a_killed_rank_restarts_all_and_a_signal_to_the_launcher_ends_them(
    own: Sections, job: tuple[list[str], dict[str, str]], zygote: Any, tmp_path: Path
) -> None:
    """No loss changes by a bit."""
    arguments, environment = job
    process = subprocess.Popen(
        [sys.executable, "-m", "collie_core.cli", *arguments, "--nproc", "2", "--max-restarts", "1"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "step 5/" in line:
            break
    ranks = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    reason = "rank 1 of 2 was ended by SIGKILL; the system may have run out of memory"
    assert [line for line in err.splitlines() if "restart" in line] == [
        f"restart 1 of 1: {reason}; the run goes on from step-00000002"
    ]
    assert "SIGUSR1 asked for it" in out
    assert psutil.wait_procs(ranks, timeout=10)[1] == []
    zygote.run(__file__, "whole", world_size=2, args=(own, tmp_path / "whole"))
    found, expected = rows(tmp_path / "run"), rows(tmp_path / "whole")
    assert 6 <= len(found) < len(expected)  # with that of the evaluation
    assert found == expected[: len(found)]
    assert files.checkpoints_in(tmp_path / "run" / "checkpoints")[0].name == f"step-{found[-1]['step']:08d}"


@pytest.mark.parametrize("launcher", [more(["--standalone"])])
def test_torchruns_own_restarts_go_on_too(
    launcher: list[str], job: tuple[list[str], dict[str, str]], tmp_path: Path
) -> None:
    arguments, environment = job
    torchrun = [sys.executable, "-m", "torch.distributed.run", *launcher, "--nproc_per_node=2", "--max-restarts=1"]
    done = subprocess.run(
        [*torchrun, "-m", "collie_core.cli", *arguments],
        env=environment | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in rows(tmp_path / "run") if "loss" in row] == list(range(1, 9))


def test_mistakes_do_not_restart(job: tuple[list[str], dict[str, str]], capfd: pytest.CaptureFixture[str]) -> None:
    """Told before any process starts."""
    arguments, _ = job
    assert main([*arguments, "--nproc", "2", "--max-restarts", "3", "train.max_stepz=3"]) == 2
    assert main([*arguments, "--max-restarts", "3", "checkpoint.save_steps=null"]) == 2
    found = capfd.readouterr().err.splitlines()
    assert ["max_stepz" in found[0], "--max-restarts 3" in found[1], len(found)] == [True, True, 2]
