"""Tokens per second of every topology of four processes, and of the transformers Trainer with DeepSpeed ZeRO-3.

The same llama of 5 million parameters, the same 8 x 256 tokens a step, the same fused AdamW and clipping, float32, one
thread per process, in processes forked from one that has imported everything. Four processes on few cores show what a
topology costs beside the arithmetic, not how it scales: the cores are busy either way.

CoLLiE with ZeRO-3 and the Trainer run side by side and take turns, as in throughput.py; the ratio is the median over
pairs of steps. The other topologies run one after the other, in rounds.

    python benchmarks/topologies.py [--rounds 2] [--steps 6] [--pairs 24] [--write benchmarks/results/topologies.md]
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read by imports

import argparse
import logging
import re
import statistics
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from throughput import (
    BATCH,
    LENGTH,
    WARM_UP,
    ZERO_3,
    Rows,
    StepEnd,
    new_model,
    samples,
    taking_turns,
    transformers_trainer,
)

from collie_core.api import RunConfig, Trainer

PROCESSES = 4
SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 4000,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": LENGTH,
}
TOPOLOGIES = ["dp4", "dp4zero1", "dp4zero2", "tp4", "tp2dp2", "pp4", "pp2dp2", "tp2pp2"]
OURS, TRAINER = "dp4zero3", "transformers Trainer, ZeRO-3"
MICRO_BATCHES = 4  # of a step, where there is a pipeline to fill


def collie(topology: str, rows: Rows, output: str, step_ended: Callable[[], None]) -> None:
    """A CoLLiE run on a topology."""
    sizes = {"tp": 1, "pp": 1, "dp": 1, "zero": 0}
    sizes |= {axis: int(size) for axis, size in re.findall(r"([a-z]+)(\d+)", topology)}
    config = RunConfig(
        model={"config": SHAPE},
        tokenizer={"type": "byte"},
        data={"max_length": LENGTH},
        parallel={
            "tensor_parallel_size": sizes["tp"],
            "pipeline_parallel_size": sizes["pp"],
            "zero_stage": sizes["zero"],
        },
        train={
            "num_train_epochs": 1,
            "global_batch_size": BATCH,
            "gradient_accumulation_steps": MICRO_BATCHES if sizes["pp"] > 1 else 1,
            "output_dir": output,
        },
        optimizer={"type": "adamw", "lr": 1e-4},
    )
    Trainer(config, train_dataset=rows, callbacks=[StepEnd(step_ended)], observers=()).train()


def step_seconds(names: list[str], steps: int) -> dict[str, list[float]]:
    """How long the steps of contenders that take turns took, each on four forked processes."""
    rows = samples(steps + WARM_UP, SHAPE["vocab_size"])
    theirs = partial(transformers_trainer, rows, model=partial(new_model, SHAPE), deepspeed_config=ZERO_3)
    with tempfile.TemporaryDirectory() as root:
        contenders = {
            name: theirs if name == TRAINER else partial(collie, name, rows, f"{root}/{name}") for name in names
        }
        return taking_turns(contenders, steps, processes=PROCESSES, threads=1)


def table(seconds: dict[str, list[float]]) -> str:
    """Markdown: the median step, tokens per second, and of ZeRO-3 the speed over the Trainer."""
    lines = ["| | ms per step | tokens/s |", "|---|--:|--:|"]
    for name, steps in seconds.items():
        median = statistics.median(steps)
        lines.append(f"| {name} | {median * 1e3:.0f} | {BATCH * LENGTH / median:.0f} |")
    ratios = [theirs / ours for theirs, ours in zip(seconds[TRAINER], seconds[OURS], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    verdict = (
        f"CoLLiE's speed with ZeRO-3 over the Trainer's: {middle:.3f} (half of the pairs: {low:.3f} to {high:.3f})"
    )
    return "\n".join([*lines, "", verdict])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6, help="of each topology in a round")
    parser.add_argument("--pairs", type=int, default=24, help="of steps of CoLLiE and of the Trainer")
    parser.add_argument("--write", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {name: [] for name in TOPOLOGIES}
    for _ in range(args.rounds):
        for name in TOPOLOGIES:
            seconds[name] += step_seconds([name], args.steps)[name]
    seconds |= step_seconds([OURS, TRAINER], args.pairs)
    parameters = sum(parameter.numel() for parameter in new_model(SHAPE).parameters())
    text = (
        f"{parameters / 1e6:.1f} M parameters, {BATCH} x {LENGTH} tokens a step, float32, {PROCESSES} processes of one "
        f"thread on {os.cpu_count()} cores, torch {torch.__version__}, DeepSpeed {deepspeed.__version__}, "
        f"{args.rounds} rounds of {args.steps} steps, {args.pairs} pairs\n\n{table(seconds)}\n"
    )
    print(text)
    if args.write:
        args.write.parent.mkdir(parents=True, exist_ok=True)
        args.write.write_text(text)


if __name__ == "__main__":
    main()
