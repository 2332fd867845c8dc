"""Short runs: a small llama with random weights on made-up questions, on any topology."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from collie_core.api import RunConfig, Trainer
from collie_testkit.registry import Skipped

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 259,  # of the byte tokenizer; odd, so that no number of ranks divides it
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": 257,
}
BATCH = 4  # samples of a step, over all data-parallel ranks

Sections = dict[str, dict[str, Any]]


class Record:
    """A callback that keeps loss and gradient norm of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []

    def collie_after_step(self, loss: Any) -> None:
        """Every step, every rank."""
        self.losses.append(loss.item())

    def collie_metrics(self, values: Mapping[str, Any]) -> None:
        """Every step, the main rank."""
        self.norms.append(values["grad_norm"])


def sizes_of(topology: str) -> dict[str, int]:
    """`tp2pp2dp2zero1` in numbers."""
    return {"tp": 1, "pp": 1, "dp": 1, "zero": 0} | {
        name: int(size) for name, size in re.findall(r"([a-z]+)(\d+)", topology)
    }


def ranks_of(topology: str) -> int:
    """How many processes it takes."""
    sizes = sizes_of(topology)
    return sizes["tp"] * sizes["pp"] * sizes["dp"]


def questions(folder: Path, count: int = 24) -> Path:
    """A file of rows {input, output} of different lengths, which is left alone where it is."""
    path = folder / "questions.jsonl"
    if path.exists():
        return path
    rows = [
        {"input": f"Count to {number}: ", "output": " ".join(map(str, range(1, number + 1)))}
        for number in range(1, count + 1)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sections_on(topology: str, folder: Path, output: Path, *, steps: int) -> Sections:
    """A run of `steps` steps on the questions in `folder`; the model is `LLAMA` with random weights."""
    sizes = sizes_of(topology)
    return {
        "model": {"config": LLAMA},
        "tokenizer": {"type": "byte"},
        "data": {"train": str(folder / "questions.jsonl"), "max_length": 64, "long_samples": "truncate",
                 "cache_dir": str(folder / "cache")},
        "parallel": {
            "tensor_parallel_size": sizes["tp"],
            "pipeline_parallel_size": sizes["pp"],
            "zero_stage": sizes["zero"],
        },
        "train": {
            "max_steps": steps,
            "per_device_train_batch_size": BATCH // sizes["dp"],
            "seed": 7,
            "output_dir": str(output / "run"),
            "overwrite_output_dir": True,
        },
        "lr_scheduler": {"type": "constant"},
    }  # fmt: skip


def train(sections: Sections, *callbacks: object) -> Record:
    """This rank's part of the run."""
    record = Record()
    Trainer(RunConfig(**sections), callbacks=[record, *callbacks], observers=()).train()
    return record


def has_deepspeed() -> bool:
    """Whether it is installed."""
    return find_spec("deepspeed") is not None


def require_deepspeed() -> None:
    """Skip a check of ZeRO where DeepSpeed is not installed."""
    if not has_deepspeed():
        raise Skipped("deepspeed is not installed: pip install 'collie-core[deepspeed]'")


def largest_difference(first: list[float], second: list[float]) -> float:
    """Of two lists of losses, or of norms, relative where they are above 1."""
    if len(first) != len(second):
        return float("inf")
    return max(abs(a - b) / max(1.0, abs(b)) if a == a else float("inf") for a, b in zip(first, second, strict=True))
