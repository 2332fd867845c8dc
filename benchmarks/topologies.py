"""Tokens per second of every topology of four processes, and of the transformers Trainer with DeepSpeed ZeRO-3.

The same llama of 5 million parameters, the same 8 x 256 tokens a step, the same fused AdamW and clipping, float32, one
thread per process. Four processes on few cores show what a topology costs beside the arithmetic, not how it scales:
the cores are busy either way. Each round runs every contender once, in processes forked from one that has imported
everything; the tables give the median step of all rounds, the ratio to the Trainer the median over rounds.

    python benchmarks/topologies.py [--rounds 4] [--steps 6] [--write benchmarks/results/topologies.md]
"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": "cpu"}  # read by imports

import argparse
import itertools
import logging
import multiprocessing
import re
import socket
import statistics
import sys
import tempfile
import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import deepspeed
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainerCallback, TrainingArguments
from transformers import Trainer as TransformersTrainer

from collie_core.api import RunConfig, Trainer
from collie_core.compat import deepspeed_start

PROCESSES, BATCH, LENGTH, WARM_UP = 4, 8, 256, 2
SHAPE = {
    "vocab_size": 4000,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": LENGTH,
}
TOPOLOGIES = ["tp4", "tp2dp2", "tp2pp2", "pp4", "pp2dp2", "dp4", "dp4zero1", "dp4zero2", "dp4zero3"]
TRAINER, OURS = "transformers Trainer, ZeRO-3", "dp4zero3"
MICRO_BATCHES = 4  # of a step, where there is a pipeline to fill


def samples(steps: int) -> list[dict[str, list[int]]]:
    """Random tokens, all of them targets."""
    ids = torch.randint(0, SHAPE["vocab_size"], (steps * BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids.tolist()]


class StepEnds(TrainerCallback):
    """Keeps when the steps of either trainer ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.times.append(time.perf_counter())

    def collie_after_step(self) -> None:
        self.times.append(time.perf_counter())


def collie(topology: str, rows: list[dict[str, list[int]]], folder: str, ends: StepEnds) -> None:
    """A CoLLiE run on a topology."""
    sizes = {"tp": 1, "pp": 1, "dp": 1, "zero": 0}
    sizes |= {axis: int(size) for axis, size in re.findall(r"([a-z]+)(\d+)", topology)}
    config = RunConfig(
        model={"config": {"model_type": "llama", **SHAPE}},
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
            "output_dir": f"{folder}/run",
        },
        optimizer={"type": "adamw", "lr": 1e-4},
    )
    Trainer(config, train_dataset=rows, callbacks=[ends], observers=()).train()


def transformers_trainer(rows: list[dict[str, list[int]]], folder: str, ends: StepEnds) -> None:
    """The transformers Trainer over DeepSpeed."""
    torch.manual_seed(0)
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=BATCH // PROCESSES,
        num_train_epochs=1,
        learning_rate=1e-4,
        optim="adamw_torch_fused",
        max_grad_norm=1.0,
        use_cpu=True,
        ddp_backend="gloo",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=10_000,
        deepspeed={
            "zero_optimization": {"stage": 3},
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_clipping": "auto",
        },
    )
    with deepspeed_start(int(os.environ["LOCAL_RANK"])):  # the same start: nothing is compiled
        model = LlamaForCausalLM(LlamaConfig(**SHAPE))
        trainer = TransformersTrainer(model, arguments, train_dataset=rows, callbacks=[ends])
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def step_seconds(name: str, steps: int) -> list[float]:
    """How long the steps of a contender took on four forked processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (port, name, steps, folder, theirs)
        ranks = [fork.Process(target=be_rank, args=(number, *arguments)) for number in range(PROCESSES)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
    if any(rank.exitcode for rank in ranks):
        sys.exit(f"{name} does not train")
    seconds: list[float] = ours.recv()
    return seconds


def be_rank(rank: int, port: int, name: str, steps: int, folder: str, result: Connection) -> None:
    """One of the four."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(PROCESSES),
        "LOCAL_WORLD_SIZE": str(PROCESSES),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    rows, ends = samples(steps + WARM_UP), StepEnds()
    if name == TRAINER:
        transformers_trainer(rows, folder, ends)
    else:
        collie(name, rows, folder, ends)
    if rank == 0:
        result.send([end - begin for begin, end in itertools.pairwise(ends.times[WARM_UP - 1 :])])
    sys.stdout.flush()
    os._exit(0)  # not through the exit handlers of libraries that were forked


def table(seconds: dict[str, list[list[float]]]) -> str:
    """Markdown: the median step, tokens per second, and of ZeRO-3 the speed over the Trainer."""
    lines = ["| | ms per step | tokens/s |", "|---|--:|--:|"]
    for name, rounds in seconds.items():
        median = statistics.median(step for steps in rounds for step in steps)
        lines.append(f"| {name} | {median * 1e3:.0f} | {BATCH * LENGTH / median:.0f} |")
    pairs = zip(seconds[TRAINER], seconds[OURS], strict=True)
    ratios = [statistics.median(theirs) / statistics.median(mine) for theirs, mine in pairs]
    spread = f"{min(ratios):.3f} to {max(ratios):.3f} in {len(ratios)} rounds"
    return "\n".join(
        [*lines, "", f"CoLLiE's speed with ZeRO-3 over the Trainer's: {statistics.median(ratios):.3f} ({spread})"]
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--write", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    names = [*TOPOLOGIES, TRAINER]  # those of the ratio side by side
    seconds: dict[str, list[list[float]]] = {name: [] for name in names}
    for number in range(args.rounds):
        for name in names if number % 2 == 0 else reversed(names):  # a drift of the machine's speed evens out
            seconds[name].append(step_seconds(name, args.steps))
    parameters = sum(parameter.numel() for parameter in LlamaForCausalLM(LlamaConfig(**SHAPE)).parameters())
    text = (
        f"{parameters / 1e6:.1f} M parameters, {BATCH} x {LENGTH} tokens a step, float32, {PROCESSES} processes of one "
        f"thread on {os.cpu_count()} cores, torch {torch.__version__}, DeepSpeed {deepspeed.__version__}, "
        f"{args.rounds} rounds of {args.steps} steps\n\n{table(seconds)}\n"
    )
    print(text)
    if args.write:
        args.write.parent.mkdir(parents=True, exist_ok=True)
        args.write.write_text(text)


if __name__ == "__main__":
    main()
