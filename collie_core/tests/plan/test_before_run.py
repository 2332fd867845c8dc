"""The plan at the start of a run: how much memory there is, what is said, what is kept, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from collie_core import watch
from collie_core.cli import main
from collie_core.config.run import RunConfig
from collie_core.errors import RunError
from collie_core.plan import before_run, room
from collie_core.plan.before_run import changed, plan_before_run
from collie_core.plan.room import Room

GIB = 2**30


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """A run that trains in a second."""
    rows = [{"input": f"{number} plus one is ", "output": str(number + 1)} for number in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    llama = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sections = {
        "model": {"config": llama | {"num_attention_heads": 4, "num_key_value_heads": 2}},
        "tokenizer": "byte",
        "data": {"train": str(tmp_path / "rows.jsonl"), "max_length": 32, "cache_dir": str(tmp_path / "cache")},
        "train": {"max_steps": 1, "per_device_train_batch_size": 4, "output_dir": str(tmp_path / "run")},
    }
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(sections))
    return path


def give(monkeypatch: pytest.MonkeyPatch, found: Room) -> None:
    monkeypatch.setattr(Room, "here", classmethod(lambda cls: found))


def raising(error: Exception) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def test_neighbouring_ranks_share_the_memory_of_a_machine() -> None:
    held = {0: 1, 1: 2, 2: 4, 3: 8}
    assert Room(0, 1).needed(held) == 8
    assert Room(0, 2).needed(held) == 12
    assert Room(0, 4).needed(held) == 15


@pytest.mark.parametrize(
    ("names", "line", "top"),
    [
        (("memory.max", "memory.current", "inactive_file"), "0::/user/job", ""),
        (("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"), "4:memory:/user/job", "memory"),
    ],
)
def test_a_container_may_have_less_than_its_machine(
    names: tuple[str, str, str], line: str, top: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit, use, cached = names
    for folder, most in (("", "max"), ("user", str(1000 * GIB)), ("user/job", "5000")):
        group = tmp_path / top / folder
        group.mkdir(parents=True, exist_ok=True)
        (group / limit).write_text(f"{most}\n")
        (group / use).write_text("3000\n")
        (group / "memory.stat").write_text(f"anon 7\n{cached} 500\n")
    (tmp_path / "cgroup").write_text(f"7:cpu:/elsewhere\n{line}\n")
    monkeypatch.setattr(room, "CGROUPS", tmp_path)
    monkeypatch.setattr(room, "OWN", tmp_path / "cgroup")
    assert room.free_memory() == 5000 - 3000 + 500


def test_a_run_says_its_plan_and_keeps_it(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    give(monkeypatch, Room(2 * GIB, 1))
    assert main(["train", str(run_file)]) == 0
    (said,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  memory")]
    kept = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert "of 2.00 GiB at the peak, in " in said
    assert "weights" in said
    assert kept["predicted_peak_bytes"] == kept["ranks"][0]["predicted_peak_bytes"] > 100_000
    assert kept["memory_bytes"] == 2 * GIB
    assert kept["rank_0_resident_peak_bytes"] > kept["predicted_peak_bytes"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["facts"]["memory"] in said


def test_what_cannot_fit_is_refused_unless_it_is_forced(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (callback,) = plan_before_run(RunConfig.from_yaml(run_file), force=False)
    needed = callback.plan["predicted_peak_bytes"]
    give(monkeypatch, Room(needed - 1024, 1))
    assert main(["train", str(run_file)]) == 1
    refusal = capsys.readouterr().err
    assert "the run does not fit: it would need 1 KiB more than" in refusal
    assert "  model.gradient_checkpointing=full\n" in refusal
    assert "--force starts it as it is" in refusal
    assert not (tmp_path / "run").exists()
    (callback,) = plan_before_run(RunConfig.from_yaml(run_file), force=True)
    assert callback.sentence.endswith("does not fit; started by --force")
    monkeypatch.setattr(before_run, "find_remedy", raising(RunError("no memory for it")))
    with pytest.raises(RunError, match="what would make it fit is not known: no memory for it\n--force"):
        plan_before_run(RunConfig.from_yaml(run_file), force=False)


def test_two_ranks_of_one_machine_need_it_together(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = changed(RunConfig.from_yaml(run_file), {"parallel.tensor_parallel_size": 2})
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    (callback,) = plan_before_run(config, force=False)
    assert callback.plan["ranks_sharing_it"] == 2
    assert "at the peaks of 2 ranks" in callback.sentence
    monkeypatch.setenv("RANK", "1")
    assert plan_before_run(config, force=False) == []


def test_a_run_that_cannot_be_planned_starts_all_the_same(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = RunError("of no known kind")
    monkeypatch.setattr(before_run, "make_plan", raising(refused))
    (callback,) = plan_before_run(RunConfig.from_yaml(run_file), force=False)
    assert (callback.sentence, callback.plan) == ("not planned: of no known kind", {})
    crash = RuntimeError("in a process of the plan:\nTraceback ...\nZeroDivisionError: no")
    monkeypatch.setattr(before_run, "make_plan", raising(crash))
    (callback,) = plan_before_run(RunConfig.from_yaml(run_file), force=False)
    assert (callback.sentence, callback.plan) == ("not planned: ZeroDivisionError: no", {})


def test_what_is_offloaded_needs_main_memory(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offloaded = changed(RunConfig.from_yaml(run_file), {"parallel.zero_stage": 2, "parallel.offload_optimizer": "true"})
    give(monkeypatch, Room(80 * GIB, 1, "NVIDIA", Room(GIB, 1)))
    (callback,) = plan_before_run(offloaded, force=False)
    assert callback.sentence.endswith("of 1.00 GiB of main memory for what is offloaded")
    assert callback.plan["ranks"][0]["predicted_host_peak_bytes"] > 100_000
    give(monkeypatch, Room(80 * GIB, 1, "NVIDIA", Room(1024, 1)))
    with pytest.raises(RunError, match="more than the 1 KiB of main memory that are free"):
        plan_before_run(offloaded, force=False)


def test_the_others_wait_for_the_plan_of_the_main_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    asked: list[str] = []

    def is_told(place: str) -> bool:
        asked.append(place)
        if len(asked) == 3:
            told.append(place)
        return place in told

    for rank, times in ((1, 3), (0, 1)):
        asked.clear()
        told.clear()
        member = SimpleNamespace(rank=rank)
        monkeypatch.setattr(watch, "_current", SimpleNamespace(member=member, tell=told.append, is_told=is_told))
        watch.reached_by_main("plan")
        assert asked == ["plan"] * times
