"""Tokens per second of a CoLLiE run over a bare torch loop and over the transformers Trainer, in one process.

The same llama of 15 million parameters, the same samples (8 x 256 tokens a step), the same fused AdamW and clipping,
float32. The three take turns, a few steps each, several rounds, so that a machine whose speed drifts slows all of them;
each step's wall time is kept, the first two of every turn are not. Ratios are those of the medians.

    python benchmarks/throughput.py [--rounds 4] [--steps 6] [--write]
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments
from transformers import Trainer as TransformersTrainer

from collie_core.api import RunConfig, Trainer
from collie_core.hookspecs import Run

BATCH, LENGTH, WARM_UP = 8, 256, 2
SHAPE = {
    "model_type": "llama",
    "vocab_size": 8000,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": LENGTH,
}


def new_model() -> LlamaForCausalLM:
    """The llama all three train, always from the same weights."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{key: value for key, value in SHAPE.items() if key != "model_type"}))


def samples(steps: int) -> list[dict[str, list[int]]]:
    """Random tokens, all of them targets."""
    ids = torch.randint(0, SHAPE["vocab_size"], (steps * BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids.tolist()]


def bare(rows: list[dict[str, list[int]]]) -> list[float]:
    """Seconds of each step of a loop that does only what must be done."""
    model = new_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    seconds = []
    for start in range(0, len(rows), BATCH):
        began = time.perf_counter()
        ids = torch.tensor([row["input_ids"] for row in rows[start : start + BATCH]])
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    return seconds


class Stamps(TrainerCallback):
    """The time between the ends of steps, for either trainer."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.times.append(time.perf_counter())

    def collie_after_step(self, run: Run) -> None:
        self.times.append(time.perf_counter())

    def seconds(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]


def transformers_trainer(rows: list[dict[str, list[int]]]) -> list[float]:
    """Seconds of each step of the transformers Trainer, quiet."""
    stamps = Stamps()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=BATCH,
            num_train_epochs=1,
            learning_rate=1e-4,
            optim="adamw_torch_fused",
            max_grad_norm=1.0,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=10_000,
        )
        trainer = TransformersTrainer(new_model(), arguments, train_dataset=rows, callbacks=[stamps])
        trainer.train()
    return stamps.seconds()


def collie(rows: list[dict[str, list[int]]]) -> list[float]:
    """Seconds of each step of a CoLLiE run with everything it does by default: log, metrics.jsonl, report."""
    stamps = Stamps()
    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig.model_validate(
            {
                "model": {"config": SHAPE},
                "tokenizer": {"type": "byte"},
                "data": {"max_length": LENGTH},
                "train": {
                    "num_train_epochs": 1,
                    "per_device_train_batch_size": BATCH,
                    "output_dir": f"{folder}/run",
                },
                "optimizer": {"type": "adamw", "lr": 1e-4},
            }
        )
        Trainer(config, model=new_model(), train_dataset=rows, callbacks=[stamps]).train()
    return stamps.seconds()


def measure(rounds: int, steps: int) -> dict[str, float]:
    """Median seconds per step of each."""
    contenders: dict[str, Callable[[list[dict[str, list[int]]]], list[float]]] = {
        "CoLLiE": collie,
        "bare torch loop": bare,
        "transformers Trainer": transformers_trainer,
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    rows = samples(steps + WARM_UP)
    for _ in range(rounds):
        for name, contender in contenders.items():
            seconds[name] += contender(rows)[WARM_UP:]
    return {name: statistics.median(values) for name, values in seconds.items()}


def table(medians: dict[str, float]) -> str:
    """Markdown: tokens per second and CoLLiE's ratio to each."""
    ours = medians["CoLLiE"]
    lines = ["| | ms per step | tokens/s | CoLLiE is |", "|---|--:|--:|--:|"]
    for name, value in medians.items():
        ratio = "" if name == "CoLLiE" else f"{value / ours:.3f} x"
        lines.append(f"| {name} | {value * 1e3:.0f} | {BATCH * LENGTH / value:.0f} | {ratio} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--write", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    parameters = sum(parameter.numel() for parameter in new_model().parameters())
    text = (
        f"{parameters / 1e6:.1f} M parameters, {BATCH} x {LENGTH} tokens a step, float32, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}\n\n{table(measure(args.rounds, args.steps))}\n"
    )
    print(text)
    if args.write:
        args.write.write_text(text)


if __name__ == "__main__":
    main()
