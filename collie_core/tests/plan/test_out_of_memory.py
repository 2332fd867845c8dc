"""A run that runs out of memory says what it held, what the plan says, and what would fit."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from collie_core.config.run import RunConfig
from collie_core.errors import OutOfMemory, PluginError
from collie_core.loop import Trainer
from collie_core.plan import out_of_memory, ways_out
from collie_core.plan.out_of_memory import explained, held_bytes
from collie_core.plan.ways_out import Request, as_json

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
ROWS = [{"input": f"{number} plus one is ", "output": str(number + 1)} for number in range(8)]
MEBIBYTES = 2**20
OF_CUDA = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.11 GiB of which"


def trainer(folder: Path, fail: Callable[[], object], **train: Any) -> Trainer:
    """A run that fails before its second update."""

    class Greedy:
        def collie_before_update(self, run: Any) -> None:
            if run.step == 1:
                fail()

    config = RunConfig(
        model={"config": LLAMA},
        tokenizer="byte",
        data={"train": "given by the program", "max_length": 64, "cache_dir": str(folder / "cache")},
        train={"max_steps": 3, "per_device_train_batch_size": 4, "output_dir": str(folder / "run")} | train,
    )
    return Trainer(config, train_dataset=ROWS, callbacks=[Greedy()], observers=())


def refuse(text: str = OF_CUDA) -> None:
    raise torch.OutOfMemoryError(text)


def test_memory_that_the_system_refuses_is_explained(tmp_path: Path) -> None:
    with pytest.raises(OutOfMemory) as caught:
        trainer(tmp_path, lambda: torch.empty(2**50, dtype=torch.uint8)).train()
    refused, holds, plan, way_out = str(caught.value).splitlines()
    assert refused.startswith("out of memory: 1024 TiB were asked for, and ")
    assert holds.startswith("this process holds ")
    assert plan.startswith("the plan says ")
    assert "activations" in plan
    assert way_out.startswith("nothing was found that would fit")
    assert "DefaultCPUAllocator" in str(caught.value.__cause__)


def test_the_ways_out_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Request] = []

    def planned(request: Request, _: RunConfig) -> tuple[list[str], str]:
        asked.append(request)
        return ["5 MiB at the peak", "model.gradient_checkpointing=full  (3 MiB)"], ""

    monkeypatch.setattr(out_of_memory, "_planned", planned)
    monkeypatch.setattr(out_of_memory, "free_memory", lambda: 8 * MEBIBYTES)
    run = trainer(tmp_path, refuse)
    with pytest.raises(OutOfMemory) as caught:
        run.train()
    lines = str(caught.value).splitlines()
    assert lines[0] == "out of memory: 20 MiB were asked for, and 8 MiB of main memory were free"
    assert lines[2:] == [
        "the plan says 5 MiB at the peak",
        "any of these would fit, by the plan:",
        "  model.gradient_checkpointing=full  (3 MiB)",
    ]
    (request,) = asked
    assert (request.processes, request.sharing, request.gpu, request.short) == (1, 1, False, 12 * MEBIBYTES)
    assert RunConfig.from_text(request.config).model.dtype == "float32"
    held, weights = held_bytes(run.parts), sum(one.nbytes for one in run.model.parameters())
    assert held["gradients"] == weights <= held["weights"] < 1.1 * weights  # and the frequencies of the positions
    assert 2 * weights <= held["optimizer state"] < 2.1 * weights


def test_the_cause_may_lie_below_and_other_errors_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out_of_memory, "_planned", lambda *_: ([], "planning took longer than 1 s"))
    parts = trainer(tmp_path, refuse).parts
    caused = PluginError("optimizer lion could not be built")
    caused.__cause__ = MemoryError()
    with pytest.raises(OutOfMemory, match="what would fit is not known: planning took longer"), explained(parts):
        raise caused
    for other in (PluginError("broken"), RuntimeError("sizes differ")):
        with pytest.raises(type(other), match=str(other)), explained(parts):
            raise other


def test_what_is_short_of_memory_is_planned_smaller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = trainer(tmp_path, refuse, gradient_accumulation_steps=2).config
    request = Request(config.to_yaml(), processes=1, sharing=1, gpu=True, short=1)
    monkeypatch.setattr("sys.stdin", io.StringIO(as_json(request)))
    ways_out.main()
    plan, *ways = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert " at the peak, in " in plan
    assert [way.partition("  ")[0] for way in ways] == [
        "model.gradient_checkpointing=full",
        "train.per_device_train_batch_size=1 train.gradient_accumulation_steps=8",
        "data.max_length=32",
    ]
