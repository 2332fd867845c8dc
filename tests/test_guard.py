"""Steps without numbers, and jumps of the loss: left out, undone or the end, alike on all ranks of every topology."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from combos import more
from runs import Sections, changed, sections_on
from safetensors.torch import load_file
from topologies import world_size_of

from collie_core.api import CollieError, RunConfig, Trainer
from collie_core.checkpoint import files
from collie_core.engine.step import token_mean_loss

STEPS = 8


def sections(topology: str, model: Path, data: Path, output: Path, **changes: Any) -> Sections:
    found = sections_on(topology, model, data, output, steps=STEPS, micro_batch=4)
    found["data"]["cache_dir"] = str(output.with_name("cache"))
    found["optimizer"] = {"type": "adalomo" if "fused" in str(output) else "adamw", "lr": 3e-3}
    found["checkpoint"] = {"save_steps": 2}
    return changed(found, {key.replace("__", "."): value for key, value in changes.items()})


class Bad:
    """A run whose loss is multiplied by `factor` in some steps; keeps the losses, and the weights after each step."""

    def __init__(self, steps: set[int], factor: float = math.nan) -> None:
        self.steps, self.factor = steps, factor
        self.step = 0
        self.losses: list[float] = []
        self.weights: list[torch.Tensor] = []

    def collie_before_step(self, run: Any) -> None:
        self.step = run.step + 1

    def collie_after_step(self, run: Any, loss: torch.Tensor) -> None:
        self.losses.append(loss.item())
        values = [value.detach().flatten().float() for value in run.model.parameters()]
        self.weights.append(torch.cat(values))  # with ZeRO-3 what happens to be whole

    def loss(self, outputs: Any, labels: torch.Tensor, target_tokens: int) -> torch.Tensor:
        loss = token_mean_loss(outputs, labels, target_tokens)
        return loss * self.factor if self.step in self.steps else loss


def train(own: Sections, steps: set[int], factor: float = math.nan) -> tuple[list[float], list[torch.Tensor], str]:
    bad = Bad(steps, factor)
    try:
        Trainer(RunConfig(**own), callbacks=[bad], loss_fn=bad.loss, observers=None).train()
    except CollieError as error:
        return bad.losses, bad.weights, str(error)
    return bad.losses, bad.weights, ""


@pytest.fixture(scope="module")
def expected(tiny_llama: Path, instructions: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[float]]:
    """The losses of one process that leaves steps 4 and 5 out, and of one that undoes 5 to 7."""
    folder = tmp_path_factory.mktemp("expected")
    skip = sections("dp1", tiny_llama, instructions, folder / "skip", train__on_nan="skip")
    back = sections("dp1", tiny_llama, instructions, folder / "back", train__on_nan="rewind")
    back["checkpoint"]["save_steps"] = 4
    return [train(skip, {4, 5})[0], train(back, {7})[0]]


def same(losses: list[float], expected: list[float]) -> bool:
    return losses == pytest.approx(expected, abs=1e-5, nan_ok=True)


def run(zygote: Any, topology: str, *args: Any) -> Any:
    return zygote.run(__file__, "train", world_size=world_size_of(topology), args=args)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("topology", ["dp1", "dp1fused", more("tp2dp2"), "pp2", more("dp2zero1"), "dp2zero3"])
def test_a_step_without_numbers_is_left_out_or_undone(
    topology: str, tiny_llama: Path, instructions: Path, tmp_path: Path, zygote: Any, expected: list[list[float]]
) -> None:
    plain = topology.removesuffix("fused")
    skip = sections(plain, tiny_llama, instructions, tmp_path / topology / "skip", train__on_nan="skip")
    for losses, weights, raised in run(zygote, plain, skip, {4, 5}):
        assert not raised
        assert [step for step, loss in enumerate(losses, 1) if math.isnan(loss)] == [4, 5]
        if plain != "dp2zero3":
            assert torch.equal(weights[2], weights[3])
            assert torch.equal(weights[3], weights[4])
            assert not torch.equal(weights[4], weights[5])
        if topology != "dp1fused":
            assert same(losses, expected[0])
    rows = [json.loads(line) for line in (Path(skip["train"]["output_dir"]) / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("lost_steps") for row in rows] == [None, None, None, 1, 2, 2, 2, 2]
    assert rows[3]["loss"] is None

    back = sections(plain, tiny_llama, instructions, tmp_path / topology / "back", train__on_nan="rewind")
    back["checkpoint"]["save_steps"] = 4
    for losses, weights, raised in run(zygote, plain, back, {7}):
        assert not raised
        assert [step for step, loss in enumerate(losses, 1) if math.isnan(loss)] == [7]
        if plain != "dp2zero3":
            assert torch.equal(weights[6], weights[3])  # after step 7 those of step 4 again
            assert not torch.equal(weights[5], weights[3])
        if topology != "dp1fused":
            assert same(losses, expected[1])
    folder = Path(back["train"]["output_dir"]) / "checkpoints"
    assert [files.verify(path).step for path in files.checkpoints_in(folder)] == [8, 4]
    last = load_file(folder / "step-00000008" / files.STATES)
    counts = {float(value) for name, value in last.items() if name.endswith("/step")}
    assert counts <= {5.0}  # four updates that were kept, and that of step 8


def test_going_on_after_a_skip_is_the_same_to_the_bit(tiny_llama: Path, instructions: Path, tmp_path: Path) -> None:
    whole = train(sections("dp1", tiny_llama, instructions, tmp_path / "a", train__on_nan="skip"), {3})
    own = sections("dp1", tiny_llama, instructions, tmp_path / "b", train__on_nan="skip", train__max_steps=4)
    own["lr_scheduler"] = {"type": "constant"}
    first = train(own, {3})[0]
    own["train"]["max_steps"], own["train"]["overwrite_output_dir"] = STEPS, False
    own["checkpoint"]["resume_from_checkpoint"] = "auto"
    second = train(own, {3})[0]
    assert len(first) + len(second) == len(whole[0])
    constant = sections("dp1", tiny_llama, instructions, tmp_path / "c", train__on_nan="skip")
    constant["lr_scheduler"] = {"type": "constant"}
    assert str(first + second) == str(train(constant, {3})[0])


def test_when_a_run_stops_all_the_same(tiny_llama: Path, instructions: Path, tmp_path: Path) -> None:
    def said(bad: set[int], **changes: Any) -> str:
        own = sections("dp1", tiny_llama, instructions, tmp_path / str(len(list(tmp_path.iterdir()))), **changes)
        return train(own, bad)[2]

    assert said({3}).startswith("the gradient norm is nan: the update was not applied.")
    assert "10 steps in a row had to be left out" in said(set(range(2, 99)), train__on_nan="skip", train__max_steps=15)
    assert said({2}, train__on_nan="rewind").startswith("there is no checkpoint to go back to: the gradient norm is")
    often = said({5, 6, 7, 8}, train__on_nan="rewind", checkpoint__save_steps=4)
    assert "has gone back to step-00000004 3 times, so it stops" in often
    assert "it goes back to a checkpoint, and there are none" in problem(train__on_nan="rewind", checkpoint={})
    assert "DeepSpeed cannot drop gradients" in problem(train__spike_factor=3.0, parallel__zero_stage=1)


def problem(**changes: Any) -> str:
    found: Sections = {"train": {"max_steps": 1}, "model": {"model_name_or_path": "x"}, "data": {"train": "y"}}
    changes.pop("checkpoint", None)
    with pytest.raises(CollieError) as caught:
        RunConfig(**changed(found, {key.replace("__", "."): value for key, value in changes.items()}))
    return str(caught.value)


@pytest.mark.parametrize("topology", ["dp1", "tp2"])
def test_a_jump_of_the_loss_is_left_out(
    topology: str, tiny_llama: Path, instructions: Path, tmp_path: Path, zygote: Any
) -> None:
    own = sections(topology, tiny_llama, instructions, tmp_path, train__on_nan="skip", train__spike_factor=2.0)
    own["train"]["max_steps"] = 14
    for losses, weights, raised in run(zygote, topology, own, {5, 12}, 5.0):
        assert not raised
        assert [step for step, loss in enumerate(losses, 1) if loss > 10] == [5, 12]
        assert not torch.equal(weights[3], weights[4])  # too early to know what is usual
        assert torch.equal(weights[10], weights[11])
        assert not torch.equal(weights[11], weights[12])
