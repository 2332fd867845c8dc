"""Tokens per second of every topology of four processes, and of the transformers Trainer with DeepSpeed ZeRO-3.

The same llama of 5 million parameters, the same 8 x 256 tokens a step, the same fused AdamW and clipping, float32, one
thread per process, in processes forked from one that has imported everything. Four processes on few cores show what a
topology costs beside the arithmetic, not how it scales: the cores are busy either way.

CoLLiE with ZeRO-3 and the Trainer run side by side, of which one at a time may move, a step each in turn, so that a
machine whose speed drifts slows both alike; the ratio is the median over pairs of steps. The other topologies run one
after the other, in rounds.

    python benchmarks/topologies.py [--rounds 2] [--steps 6] [--pairs 24] [--write benchmarks/results/topologies.md]
"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": "cpu"}  # read by imports

import argparse
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
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import deepspeed
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainerCallback, TrainingArguments
from transformers import Trainer as TransformersTrainer

from collie_core.api import RunConfig, Trainer
from collie_core.compat import deepspeed_start

PROCESSES, BATCH, LENGTH, WARM_UP = 4, 8, 256, 2
SHAPE: dict[str, Any] = {
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


def samples(steps: int) -> list[dict[str, list[int]]]:
    """Random tokens, all of them targets."""
    ids = torch.randint(0, SHAPE["vocab_size"], (steps * BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids.tolist()]


class Steps(TrainerCallback):
    """Keeps how long the steps of either trainer took after the first ones; between two, it waits for its turn.

    Args:
        steps: that it will be told of.
        turns: where the ranks of both contenders meet; None: there is no other.
        begins: whether this contender has the first turn.
    """

    def __init__(self, steps: int, turns: Barrier | None, begins: bool) -> None:
        self.seconds: list[float] = []
        self.left = steps
        self.turns = turns
        self.begins = begins
        self._began = 0.0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.collie_after_step()

    def collie_after_step(self) -> None:
        self.seconds.append(time.perf_counter() - self._began)
        self.left -= 1
        is_first_call = len(self.seconds) == 1
        if self.turns is not None:
            # The first steps are done together. Then one hands over and gets it back, and the other the reverse.
            for _ in range(1 if self.begins and (is_first_call or not self.left) else 2 if self.left else 0):
                self.turns.wait()
        self._began = time.perf_counter()


def collie(topology: str, rows: list[dict[str, list[int]]], folder: str, steps: Steps) -> None:
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
    Trainer(config, train_dataset=rows, callbacks=[steps], observers=()).train()


def transformers_trainer(rows: list[dict[str, list[int]]], folder: str, steps: Steps) -> None:
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
        trainer = TransformersTrainer(model, arguments, train_dataset=rows, callbacks=[steps])
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def step_seconds(names: list[str], steps: int) -> list[list[float]]:
    """How long the steps of contenders that take turns took, each on four forked processes."""
    fork = multiprocessing.get_context("fork")
    turns = fork.Barrier(len(names) * PROCESSES) if len(names) > 1 else None
    with tempfile.TemporaryDirectory() as root:
        ranks, results = [], []
        for number, name in enumerate(names):
            ours, theirs = fork.Pipe(duplex=False)
            results.append(ours)
            kept = Steps(steps + WARM_UP, turns, begins=number == 0)
            arguments = (free_port(), name, f"{root}/{number}", kept, theirs)
            ranks += [fork.Process(target=be_rank, args=(rank, *arguments)) for rank in range(PROCESSES)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
    if any(rank.exitcode != 0 for rank in ranks):
        sys.exit(f"{' or '.join(names)} does not train")
    return [result.recv() for result in results]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def be_rank(rank: int, port: int, name: str, folder: str, steps: Steps, result: Connection) -> None:
    """One of the four."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(PROCESSES),
        "LOCAL_WORLD_SIZE": str(PROCESSES),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    rows = samples(steps.left)
    if name == TRAINER:
        transformers_trainer(rows, folder, steps)
    else:
        collie(name, rows, folder, steps)
    if rank == 0:
        result.send(steps.seconds[WARM_UP:])
    sys.stdout.flush()
    os._exit(0)  # not through the exit handlers of libraries that were forked


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
            seconds[name] += step_seconds([name], args.steps)[0]
    seconds[OURS], seconds[TRAINER] = step_seconds([OURS, TRAINER], args.pairs)
    parameters = sum(parameter.numel() for parameter in LlamaForCausalLM(LlamaConfig(**SHAPE)).parameters())
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
