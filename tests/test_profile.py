"""`collie profile` finds what was made slow, and how slow, in the steps that a run really takes."""

from __future__ import annotations

import gzip
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from topologies import sizes_of

from collie_core.cli import main

SLEEPS = {"data": 0.06, "forward": 0.08, "backward": 0.1, "update": 0.12}  # seconds
LATE_S = 0.3
CLOCK_S = 1000.0  # by which the clock of the late rank is behind


def sections(model: Path, data: Path, folder: Path, topology: str, **more: Any) -> dict[str, Any]:
    sizes = sizes_of(topology)
    return {
        "model": {"model_name_or_path": str(model)},
        "data": {"train": str(data), "max_length": 128, "cache_dir": str(folder / "cache")},
        "parallel": {
            "tensor_parallel_size": sizes["tp"],
            "pipeline_parallel_size": sizes["pp"],
            "zero_stage": sizes["zero"],
        },
        "train": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": sizes.get("acc", 1)},
        "evaluation": {"steps": 1},
        "checkpoint": {"save_steps": 1},
    } | more


def profile(written: dict[str, Any], folder: Path, steps: int = 2) -> Any:
    """The profile of all ranks, taken as the command takes it."""
    from collie_core.api import RunConfig
    from collie_core.profiling.account import account
    from collie_core.profiling.record import overrides, record

    config = RunConfig.from_yaml(_file(written, folder), overrides(steps, folder), notes=[])
    return account(record(config, steps, folder), config.parallel.tensor_parallel_size)


def _file(written: dict[str, Any], folder: Path) -> Path:
    path = folder / f"run-{os.environ.get('RANK', '0')}.yaml"
    path.write_text(yaml.safe_dump(written))
    return path


@contextmanager
def slow(sleeps: dict[str, float]) -> Iterator[None]:
    """Inside, parts of a step take so much longer."""
    from torch.nn.modules import module
    from torch.optim import optimizer

    from collie_core.data.loader import Loader

    def sleep(part: str, slowed: str, count: int = 1) -> Callable[..., None]:
        return lambda owner, *_: time.sleep(sleeps.get(part, 0.0) / count * (type(owner).__name__ == slowed))

    load = Loader.__getitem__

    def load_slowly(self: Loader, position: int) -> Any:
        time.sleep(sleeps.get("data", 0.0))
        return load(self, position)

    with ExitStack() as stack:
        Loader.__getitem__ = load_slowly  # type: ignore[method-assign]
        stack.callback(setattr, Loader, "__getitem__", load)
        for handle in (
            module.register_module_forward_pre_hook(sleep("forward", "LlamaModel")),
            module.register_module_full_backward_hook(sleep("backward", "LlamaDecoderLayer", 2)),
            optimizer.register_optimizer_step_pre_hook(sleep("update", "AdamW")),
        ):
            stack.callback(handle.remove)
        yield


def planted(model: Path, data: Path, folder: Path) -> Any:
    """One process, in which every phase is slow by another amount."""
    with slow(SLEEPS):
        return profile(sections(model, data, folder, "dp1", optimizer="adamw"), folder)


def topologies(model: Path, data: Path, folder: Path) -> dict[str, Any]:
    """Two processes on each topology in turn. With dp2 the second one is late, and on a machine with another clock."""
    from collie_core.profiling import align

    found = {}
    for topology in ("tp2", "pp2acc2", "dp2zero2", "dp2zero3"):
        found[topology] = profile(sections(model, data, folder, topology), folder, steps=1)
    late = os.environ["RANK"] == "1"
    if late:
        now = time.perf_counter
        time.perf_counter = lambda: now() - CLOCK_S
        align._machine = lambda: "another"
    with slow({"forward": LATE_S} if late else {}):
        found["late"] = profile(sections(model, data, folder, "dp2"), folder)
    return found


def test_every_planted_delay_is_found_with_its_size(
    zygote: Any, tiny_llama: Path, instructions: Path, tmp_path: Path
) -> None:
    (found,) = zygote.run(__file__, "planted", world_size=1, args=(tiny_llama, instructions, tmp_path))
    (rank,) = found.ranks
    for part, slept in SLEEPS.items():
        assert slept <= rank.parts[part] < slept + 0.15, (part, rank.parts)
    assert rank.parts["communication"] == rank.parts["waiting"] == 0
    assert rank.parts["rest"] < 0.1
    assert sum(rank.parts.values()) == pytest.approx(sum(found.steps) / 2, rel=1e-6)
    assert found.error < 0.01
    assert 0 < found.busy < 0.9
    assert 0 < found.padding < 1
    with gzip.open(rank.trace) as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {f"collie: {part}" for part in SLEEPS} | {"aten::linear"} <= names


@pytest.fixture(scope="module")
def found(
    zygote: Any, tiny_llama: Path, instructions: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("profiled")
    first, second = zygote.run(__file__, "topologies", world_size=2, args=(tiny_llama, instructions, folder))
    assert first == second  # every rank knows of all
    return first


@pytest.mark.parametrize(
    ("topology", "axis"), [("tp2", "tp"), ("pp2acc2", "pp"), ("dp2zero2", "dp"), ("dp2zero3", "dp")]
)
def test_ranks_of_every_kind_are_accounted_for(found: dict[str, Any], topology: str, axis: str) -> None:
    profile = found[topology]
    for rank in profile.ranks:
        assert rank.error < 0.01
        assert rank.parts["communication"] + rank.parts["waiting"] > 0
        assert min(rank.parts[part] for part in ("data", "forward", "backward", "update")) > 0
        exchanged = {name: seconds + rank.axes["waiting"][name] for name, seconds in rank.axes["communication"].items()}
        assert max(exchanged, key=lambda name: exchanged[name]) == axis
    if axis == "pp":  # with two micro-batches each stage of two stands still for a third of the time
        assert profile.along("waiting", "pp") > 0.1 * profile.step_s
        assert [rank.stage for rank in profile.ranks] == [0, 1]
        assert profile.micro_batches == 2


def test_a_late_rank_is_found_with_its_size_also_by_another_clock(found: dict[str, Any]) -> None:
    profile = found["late"]
    first, second = profile.ranks
    assert LATE_S - 0.1 < first.parts["waiting"] < LATE_S + 0.15
    assert second.parts["waiting"] < LATE_S / 2
    assert second.parts["forward"] - first.parts["forward"] == pytest.approx(LATE_S, abs=0.1)
    assert profile.held_up_by("dp") == 1
    assert second.late_s["dp"] == pytest.approx(first.axes["waiting"]["dp"])


def test_steps_are_counted_from_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "run.yaml", "--steps", "0"]) == 1
    assert "--steps 0: must be at least 1" in capsys.readouterr().err
