"""The promise of the loss: a run equals a plain loop, however its batch is cut and laid out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from combos import in_everything
from plain import PlainRun
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from collie_core.api import RunConfig, Trainer

STEPS, BATCH, LR, CLIP, SEED, MAX_LENGTH = 20, 8, 1e-3, 1.0, 7, 256


class Record:
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def collie_after_step(self, loss: torch.Tensor) -> None:
        self.losses.append(loss.item())


def our_losses(model: Path, data: Path, output: Path, **changes: Any) -> list[float]:
    sections: dict[str, dict[str, Any]] = {
        "model": {"model_name_or_path": str(model)},
        "data": {"train": str(data), "max_length": MAX_LENGTH, "cache_dir": str(output / "cache")},
        "train": {
            "max_steps": STEPS,
            "per_device_train_batch_size": BATCH,
            "max_grad_norm": CLIP,
            "seed": SEED,
            "output_dir": str(output / "run"),
            "overwrite_output_dir": True,
        },
        "optimizer": {"type": "adamw", "lr": LR, "weight_decay": 0.01},
        "lr_scheduler": {"type": "cosine", "warmup_ratio": 0.1},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            sections.setdefault(section, {})[name] = value
        else:
            sections[section] = value
    record = Record()
    Trainer(RunConfig(**sections), callbacks=[record], observers=()).train()
    return record.losses


def largest_difference(first: list[float], second: list[float]) -> float:
    assert len(first) == len(second) == STEPS
    return max(abs(one - other) for one, other in zip(first, second, strict=True))


CUTS = [(8, 1, False), (4, 2, False), (2, 4, False), (1, 8, False), (8, 1, True), (4, 2, True), (1, 8, True)]


def assert_parity(model: Path, data: Path, output: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    run = PlainRun(steps=STEPS, batch=BATCH, lr=LR, clip=CLIP, seed=SEED, max_length=MAX_LENGTH)
    plain = run.train(reference, model, data).losses
    ours = our_losses(model, data, output)
    assert ours[-1] < ours[0]
    assert largest_difference(plain, ours) <= 1e-6 * max(1.0, *plain)
    runs = [
        our_losses(
            model,
            data,
            output,
            train__per_device_train_batch_size=rows,
            train__gradient_accumulation_steps=accumulation,
            data__packing=packing,
        )
        for rows, accumulation, packing in CUTS
    ]
    for first in runs:
        for second in runs:
            assert largest_difference(first, second) <= 1e-5


def test_a_run_equals_a_plain_loop_however_it_is_cut(tiny_llama: Path, instructions: Path, tmp_path: Path) -> None:
    assert_parity(tiny_llama, instructions, tmp_path)


@pytest.mark.real
@in_everything
def test_a_real_run_equals_a_plain_loop_however_it_is_cut(real_data: Path, tmp_path: Path) -> None:
    assert_parity(real_data / "stories260K-hf", real_data / "text" / "gsm8k_train_2000.jsonl", tmp_path)


@pytest.mark.filterwarnings("ignore")  # DeepSpeed calls collectives that torch deprecates
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_gives_the_same_losses(stage: int, tiny_llama: Path, instructions: Path, tmp_path: Path) -> None:
    ours = our_losses(tiny_llama, instructions, tmp_path, train__gradient_accumulation_steps=2)
    zero = our_losses(
        tiny_llama, instructions, tmp_path, train__gradient_accumulation_steps=2, parallel__zero_stage=stage
    )
    assert largest_difference(ours, zero) <= 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_lora_under_zero_trains_and_saves_the_same(
    stage: int, tiny_llama: Path, instructions: Path, tmp_path: Path
) -> None:
    adapter = {"type": "lora", "r": 4, "target_modules": ["q_proj", "down_proj"]}
    changes: dict[str, Any] = {"adapter": adapter, "optimizer__lr": 1e-2}
    weights = []
    for zero_stage in (0, stage):
        losses = our_losses(tiny_llama, instructions, tmp_path, parallel__zero_stage=zero_stage, **changes)
        weights.append((losses, load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")))
    (plain, saved), (zero, saved_by_zero) = weights
    assert plain[-1] < plain[0]
    assert largest_difference(plain, zero) <= 1e-5
    assert saved.keys() == saved_by_zero.keys()
    for name, value in saved.items():
        torch.testing.assert_close(saved_by_zero[name], value, rtol=0, atol=1e-4)


def test_gradient_checkpointing_computes_layers_twice_and_changes_nothing(
    tiny_llama: Path, instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forwards: list[int] = []
    original = LlamaMLP.forward

    def counted(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        forwards.extend([1] * torch.is_grad_enabled())  # the others tell what the model does with its head
        return original(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    ours = our_losses(tiny_llama, instructions, tmp_path)
    once = len(forwards)
    lean = our_losses(tiny_llama, instructions, tmp_path, model__gradient_checkpointing="full")
    assert len(forwards) == 3 * once  # as often again, and twice as often
    assert largest_difference(ours, lean) <= 1e-6


def losses_on_this_rank(model: Path, data: Path, output: Path, changes: dict[str, Any]) -> list[float]:
    return our_losses(model, data, output, **changes)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_two_ranks_give_the_losses_of_one(
    stage: int, packing: bool, zygote: Any, tiny_llama: Path, instructions: Path, tmp_path: Path
) -> None:
    one = our_losses(tiny_llama, instructions, tmp_path)
    changes = {
        "train__per_device_train_batch_size": 4,
        "parallel__zero_stage": stage,
        "data__packing": packing,
        "data__eval": str(instructions),
        "evaluation__print_samples": 2,
    }
    both = zygote.run(__file__, "losses_on_this_rank", world_size=2, args=(tiny_llama, instructions, tmp_path, changes))
    assert both[0] == both[1]
    assert largest_difference(one, both[0]) <= 1e-5
