"""Runs that are killed without warning, at any moment, and go on as if nothing had happened.

Every second one is killed during a save: at a random call of the functions that write it, in the thread behind the
training or in the training itself. The others are killed at a random phase of a random step, or a little later. It is
one rank that dies, or all of them at once.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from families import write_family
from runs import Sections, changed, sections_on
from topologies import world_size_of

from collie_core.api import RunConfig, Trainer
from collie_core.checkpoint import files
from collie_core.checkpoint.run import Checkpoints
from collie_testkit.zygote import RanksFailed

STEPS = 8
COUNT = int(os.environ.get("COLLIE_CRASHES", "8"))
TOPOLOGIES = ("dp1", "dp1", "dp2", "dp1", "dp1", "tp2")  # as often as they stand here
PHASES = ("collie_before_step", "collie_before_update", "collie_after_step")


def sections(topology: str, model: Path, data: Path, output: Path, asynchronous: bool) -> Sections:
    """Dropout, packing and workers; a checkpoint every other step, of which two are kept."""
    found = sections_on(topology, model, data, output, steps=STEPS, micro_batch=4)
    found["train"]["overwrite_output_dir"] = False
    found["data"] |= {"packing": True, "num_workers": 0 if topology == "dp1" else 2}
    found["data"]["cache_dir"] = str(model / "cache")
    found["optimizer"] = {"type": "adamw", "lr": 3e-3}
    checkpoint = {
        "save_steps": 2,
        "save_total_limit": 2,
        "resume_from_checkpoint": "auto",
        "asynchronous": asynchronous,
    }
    return changed(found, {f"checkpoint.{key}": value for key, value in checkpoint.items()})


class Killer:
    """Ends ranks at a moment. Made on every rank; without a plan it counts the calls of saves on the first."""

    def __init__(self, plan: dict[str, Any] | None, pids: Path) -> None:
        self.plan, self.pids = plan, pids
        self.rank = int(os.environ["RANK"])
        self.calls = 0
        pids.mkdir(parents=True, exist_ok=True)
        (pids / str(self.rank)).write_text(str(os.getpid()))
        if self.rank == 0 and (plan is None or "call" in plan):
            self._count_calls_of_saves()

    def _count_calls_of_saves(self) -> None:
        save = Checkpoints.save

        def counted(*args: Any, **options: Any) -> None:
            sys.setprofile(self._called)
            try:
                save(*args, **options)
            finally:
                sys.setprofile(None)

        Checkpoints.save = counted  # type: ignore[method-assign]  (this process is this run's alone)
        threading.setprofile(self._behind)

    def _behind(self, frame: Any, event: str, argument: Any) -> None:
        if threading.current_thread().name == "collie-checkpoint":
            self._called(frame, event, argument)

    def _called(self, frame: Any, event: str, argument: Any) -> None:
        if event in ("call", "c_call"):
            self.calls += 1
            if self.plan is not None and self.calls == self.plan["call"]:
                self.kill()

    def kill(self) -> None:
        assert self.plan is not None
        for rank in sorted(self.plan["victims"], key=lambda rank: rank == self.rank):  # this one last
            os.kill(int((self.pids / str(rank)).read_text()), signal.SIGKILL)

    def _phase(self, name: str, step: int) -> None:
        plan = self.plan
        if plan is None or "call" in plan or self.rank != 0 or (name, step) != (plan["phase"], plan["step"]):
            return
        threading.Timer(plan["delay"], self.kill).start() if plan["delay"] else self.kill()

    def collie_before_step(self, run: Any) -> None:
        self._phase("collie_before_step", run.step)

    def collie_before_update(self, run: Any) -> None:
        self._phase("collie_before_update", run.step)

    def collie_after_step(self, run: Any) -> None:
        self._phase("collie_after_step", run.step - 1)


def train(own: Sections, plan: dict[str, Any] | None, pids: Path) -> int:
    """Calls of the saves, on the first rank."""
    killer = Killer(plan, pids)
    Trainer(RunConfig(**own), callbacks=[killer]).train()
    if plan is not None and "delay" in plan:
        time.sleep(5)  # the run was faster than its murderer
    return killer.calls


def record(run: Path) -> tuple[list[Any], bytes]:
    """Every number of every step that does not measure time or memory, and the trained weights."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "epoch", "loss", "learning_rate", "grad_norm", "tokens")
    return [[row[name] for name in kept] for row in rows], (run / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "llama"
    write_family(folder, "llama_tied", changes={"attention_dropout": 0.1})
    return folder


@pytest.fixture(scope="module")
def whole(model: Path, instructions: Path, zygote: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What runs that nothing stops leave, by topology, and how many calls their saves take."""
    found = {}
    for topology in dict.fromkeys(TOPOLOGIES):
        for asynchronous in (True, False):
            output = tmp_path_factory.mktemp("whole") / topology
            own = sections(topology, model, instructions, output, asynchronous)
            size = world_size_of(topology)
            calls = zygote.run(__file__, "train", world_size=size, args=(own, None, output / "pids"))[0]
            found[topology, asynchronous] = (record(output / "run"), calls)
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(COUNT))
def test_killed_at_any_moment(
    seed: int, model: Path, instructions: Path, zygote: Any, tmp_path: Path, whole: Any
) -> None:
    chance = random.Random(seed)
    topology, asynchronous = TOPOLOGIES[seed % len(TOPOLOGIES)], chance.random() < 0.75
    size = world_size_of(topology)
    expected, calls = whole[topology, asynchronous]
    victims = list(range(size)) if chance.random() < 0.5 else [chance.randrange(size)]
    plan: dict[str, Any] = {"victims": victims}
    if (seed // len(TOPOLOGIES) + seed) % 2 == 0:
        plan["call"] = chance.randint(1, int(calls * 0.95))  # calls differ a little from run to run
    else:
        delay = chance.choice([0.0, chance.uniform(0, 0.05)])
        plan |= {"phase": chance.choice(PHASES), "step": chance.randrange(STEPS), "delay": delay}
    own = sections(topology, model, instructions, tmp_path, asynchronous)
    with pytest.raises(RanksFailed):
        zygote.run(__file__, "train", world_size=size, args=(own, plan, tmp_path / "pids"))
    run = tmp_path / "run"
    for path in files.checkpoints_in(run / "checkpoints"):
        files.verify(path)
    zygote.run(__file__, "train", world_size=size, args=(own, None, tmp_path / "pids"))
    assert record(run) == expected, plan
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert left == ["step-00000006", "step-00000008"]
    for path in files.checkpoints_in(run / "checkpoints"):
        files.verify(path)
