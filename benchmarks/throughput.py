"""CoLLiE's speed over the transformers Trainer's, plain and with DeepSpeed ZeRO-3, on full and on padded rows.

Two llamas, of 15 and of 100 million parameters, random weights, fused AdamW and clipping, float32. All contenders of a
table take the same samples, 8 a step:

* full: 256 tokens, all of them targets. Here a bare torch loop shows what there is to lose.
* padded: the lengths of instruction data. Prompts and answers are log-normal with the mean and deviation of the
  logarithm that 700 rows of the English Alpaca data have (2.78 and 0.51, 4.32 and 1.32; cut at 512 tokens), and only
  answers are targets. The Trainer pads to the longest sample of a step, as its collator for such data does; CoLLiE is
  set as `collie init` sets it, with `packing`.

Contenders are processes forked from one that has imported everything; with ZeRO-3 two each. One contender at a time may
move, a step each in turn, so that a machine whose speed drifts slows all of them alike. A turn lasts from the end of a
contender's step to the end of its next one: whatever it does between steps counts. Ratios are of the time of all steps.

    python benchmarks/throughput.py [--steps 24] [--only TEXT] [--write benchmarks/results/throughput.md]

Exit code 1 when CoLLiE's speed over either Trainer is below 1.0 on full rows, or below 1.3 on padded ones.
"""

from __future__ import annotations

import os

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": "cpu"}  # read by imports

import argparse
import logging
import multiprocessing
import random
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier, Semaphore
from pathlib import Path
from typing import Any

import deepspeed
import torch
from rich.console import Console
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
)
from transformers import Trainer as TransformersTrainer

from collie_core.api import RunConfig, Trainer
from collie_core.compat import deepspeed_start
from collie_core.data.tokenizer import byte_tokenizer
from collie_core.report.console import ConsoleReporter
from collie_core.report.html import HtmlReport
from collie_core.report.metrics import MetricsFile

BATCH, LENGTH, LONGEST, WARM_UP = 8, 256, 512, 2
CORES = os.cpu_count() or 1
SHAPE = {
    "model_type": "llama",
    "vocab_size": 8000,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": LONGEST,
}
LARGE = SHAPE | {
    "vocab_size": 32000,
    "hidden_size": 640,
    "intermediate_size": 1728,
    "num_hidden_layers": 12,
    "num_attention_heads": 10,
    "num_key_value_heads": 10,
}
ZERO_3 = {
    "zero_optimization": {"stage": 3},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_clipping": "auto",
}
Rows = list[dict[str, list[int]]]
Contender = Callable[[Callable[[], None]], None]
"""Trains, and calls what it is given after each step."""


def new_model(shape: Mapping[str, Any] = SHAPE) -> LlamaForCausalLM:
    """The llama all contenders train, always from the same weights."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{key: value for key, value in shape.items() if key != "model_type"}))


def samples(steps: int, vocabulary: int = 8000) -> Rows:
    """Random tokens, all of them targets."""
    ids = torch.randint(0, vocabulary, (steps * BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids.tolist()]


def instructions(steps: int, vocabulary: int) -> Rows:
    """Random tokens in rows as long as those of instruction data; the answers are targets."""
    chance = random.Random(1)
    rows = []
    for _ in range(steps * BATCH):
        prompt = 1 + int(chance.lognormvariate(2.78, 0.51))
        length = min(LONGEST, prompt + 1 + int(chance.lognormvariate(4.32, 1.32)))
        ids = chance.choices(range(vocabulary), k=length)
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


class StepEnd(TrainerCallback):
    """Tells either trainer's steps."""

    def __init__(self, step_ended: Callable[[], None]) -> None:
        self.step_ended = step_ended

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.step_ended()

    def collie_after_step(self) -> None:
        self.step_ended()


def bare(rows: Rows, shape: Mapping[str, Any], step_ended: Callable[[], None]) -> None:
    """A loop that does only what must be done, for rows of one length."""
    model = new_model(shape).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    for start in range(0, len(rows), BATCH):
        ids = torch.tensor([row["input_ids"] for row in rows[start : start + BATCH]])
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step_ended()


def transformers_trainer(
    rows: Rows,
    step_ended: Callable[[], None],
    model: Callable[[], Any] = new_model,
    deepspeed_config: dict[str, Any] | None = None,
) -> None:
    """The transformers Trainer, logging nothing; `model` makes the model when DeepSpeed may see it."""
    # The same start as CoLLiE's: nothing is compiled.
    quiet = deepspeed_start(int(os.environ["LOCAL_RANK"])) if deepspeed_config else nullcontext()
    with tempfile.TemporaryDirectory() as folder, quiet:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=BATCH // int(os.environ.get("WORLD_SIZE", "1")),
            num_train_epochs=1,
            learning_rate=1e-4,
            optim="adamw_torch_fused",
            max_grad_norm=1.0,
            use_cpu=True,
            ddp_backend="gloo" if deepspeed_config else None,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=10_000,
            deepspeed=deepspeed_config,
        )
        collator = DataCollatorForSeq2Seq(byte_tokenizer())
        trainer = TransformersTrainer(
            model(), arguments, train_dataset=rows, data_collator=collator, callbacks=[StepEnd(step_ended)]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def collie(
    rows: Rows, shape: Mapping[str, Any], output: str, step_ended: Callable[[], None], *, zero: int, packing: bool
) -> None:
    """A CoLLiE run with all it does by default: a log line and a row of metrics.jsonl for every step, a report."""
    with (Path(output) / "log").open("a") as log:
        config = RunConfig(
            model={"config": dict(shape)},
            tokenizer={"type": "byte"},
            data={"max_length": LONGEST if packing else LENGTH, "packing": packing},
            train={
                "num_train_epochs": 1,
                "global_batch_size": BATCH,
                "per_device_train_batch_size": BATCH // int(os.environ.get("WORLD_SIZE", "1")),  # as the Trainer
                "output_dir": f"{output}/run",
            },
            parallel={"zero_stage": zero},
            optimizer={"type": "adamw", "lr": 1e-4},
        )
        main = os.environ.get("RANK", "0") == "0"
        observers = [ConsoleReporter(Console(file=log)), HtmlReport(), MetricsFile()] if main else []
        Trainer(config, train_dataset=rows, callbacks=[StepEnd(step_ended)], observers=observers).train()


class Turns:
    """Lets contenders move one at a time, a step each, and keeps how long each step of this one took.

    Args:
        mine: released when it is this contender's turn.
        next_one: released when its step has ended.
    """

    def __init__(self, mine: Semaphore, next_one: Semaphore) -> None:
        self.mine = mine
        self.next_one = next_one
        self.seconds: list[float] = []
        self._began: float | None = None

    def step_ended(self) -> None:
        """Hand over, and return when it is this contender's turn again.

        The first turn is waited for after the first step, when all have started.
        """
        if self._began is not None:
            self.seconds.append(time.perf_counter() - self._began)
            self.next_one.release()
        self.mine.acquire()
        self._began = time.perf_counter()


def taking_turns(
    contenders: Mapping[str, Contender], steps: int, *, processes: int = 1, threads: int = CORES
) -> dict[str, list[float]]:
    """Seconds of each of the last `steps` steps of each contender, which takes `WARM_UP` steps more.

    Each runs in so many forked processes of so many threads. The first rank of each waits for its turn, and the others
    for the first.
    """
    fork = multiprocessing.get_context("fork")
    signals = [fork.Semaphore(0) for _ in contenders]
    end = fork.Barrier(len(contenders) * processes)
    ranks, results = [], []
    for number, work in enumerate(contenders.values()):
        ours, theirs = fork.Pipe(duplex=False)
        results.append(ours)
        turns = Turns(signals[number], signals[(number + 1) % len(signals)])
        port = _free_port()
        for rank in range(processes):
            environment = _environment(rank, processes, port) if processes > 1 else {}
            arguments = (work, turns, end, environment, threads, steps, theirs)
            ranks.append(fork.Process(target=_be_rank, args=arguments, daemon=True))  # none outlives this process
    for process in ranks:
        process.start()
    signals[0].release()
    seconds = [_received(result, ranks) for result in results]
    for process in ranks:
        process.join()
    return dict(zip(contenders, seconds, strict=True))


def _received(result: Connection, ranks: Sequence[Any]) -> list[float]:
    while not result.poll(1.0):
        if any(process.exitcode for process in ranks):
            sys.exit("a contender does not train")
    return list(result.recv())


def _environment(rank: int, processes: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _be_rank(
    work: Contender,
    turns: Turns,
    end: Barrier,
    environment: dict[str, str],
    threads: int,
    steps: int,
    result: Connection,
) -> None:
    os.environ |= environment
    torch.set_num_threads(threads)
    first = environment.get("RANK", "0") == "0"
    done = 0

    def step_ended() -> None:
        nonlocal done
        done += 1
        if first:
            turns.step_ended()
        if done == steps + WARM_UP:  # what it does at its end is not measured
            if first:
                turns.next_one.release()
                result.send(turns.seconds[-steps:])
            end.wait()  # a rank that leaves alone would end the others
            os._exit(0)  # not through the exit handlers of libraries that were forked

    work(step_ended)
    raise AssertionError(f"only {done} steps")


@dataclass(frozen=True)
class Table:
    """One comparison."""

    title: str
    shape: Mapping[str, Any]
    padded: bool
    zero: bool

    @property
    def least(self) -> float:
        """CoLLiE's speed over a Trainer's must not be below it."""
        return 1.3 if self.padded else 1.0

    def rows(self, steps: int) -> Rows:
        """The samples of so many steps."""
        return (instructions if self.padded else samples)(steps, self.shape["vocab_size"])

    def contenders(self, rows: Rows, output: str) -> dict[str, Contender]:
        """CoLLiE and its peers; what it writes goes into `output`."""
        shape = self.shape
        ours = partial(collie, rows, shape, output, zero=3 if self.zero else 0, packing=self.padded)
        theirs = partial(
            transformers_trainer,
            rows,
            model=partial(new_model, shape),
            deepspeed_config=ZERO_3 if self.zero else None,
        )
        found: dict[str, Contender] = {
            "CoLLiE": ours,
            f"transformers Trainer{', ZeRO-3' if self.zero else ''}": theirs,
        }
        if not (self.padded or self.zero):
            found["bare torch loop"] = partial(bare, rows, shape)
        return found


TABLES = [
    Table(f"{size}, {'padded' if padded else 'full'} rows{', ZeRO-3 on two processes' if zero else ''}", *rest)
    for size, shape in (("15 M", SHAPE), ("100 M", LARGE))
    for zero in (False, True)
    for padded in (False, True)
    for rest in [(shape, padded, zero)]
]


def compare(table: Table, steps: int) -> tuple[list[str], bool]:
    """Lines of Markdown, and whether CoLLiE is as fast as it must be."""
    rows = table.rows(steps + WARM_UP)
    tokens = sum(len(row["input_ids"]) for row in rows[WARM_UP * BATCH :])
    processes = 2 if table.zero else 1
    with tempfile.TemporaryDirectory() as output:
        contenders = table.contenders(rows, output)
        seconds = taking_turns(contenders, steps, processes=processes, threads=max(1, CORES // processes))
    ours = sum(seconds["CoLLiE"])
    lines = []
    for name, own in seconds.items():
        ratio = "" if name == "CoLLiE" else f"{sum(own) / ours:.3f}"
        lines.append(f"| {table.title} | {name} | {sum(own) / steps * 1e3:.0f} | {tokens / sum(own):.0f} | {ratio} |")
    met = all(sum(own) / ours >= table.least for name, own in seconds.items() if "Trainer" in name)
    return lines, met


def main() -> int:
    """Exit code: 0 when all targets are met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24, help="of each contender; a third with 100 M parameters")
    parser.add_argument("--only", default="", help="only tables with this in their title")
    parser.add_argument("--write", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    lines = ["| work | | ms per step | tokens/s | CoLLiE's speed over it |", "|---|---|--:|--:|--:|"]
    met = True
    for table in TABLES:
        if args.only in table.title:
            steps = args.steps if table.shape is SHAPE else max(1, args.steps // 3)
            found, good = compare(table, steps)
            print("\n".join(found), file=sys.stderr, flush=True)
            lines, met = lines + found, met and good
    text = (
        f"{BATCH} samples a step, float32, {CORES} cores, torch {torch.__version__}, DeepSpeed "
        f"{deepspeed.__version__}, {args.steps} steps of the smaller model, tokens without padding\n\n"
        + "\n".join(lines)
        + "\n"
    )
    print(text)
    if args.write:
        args.write.parent.mkdir(parents=True, exist_ok=True)
        args.write.write_text(text)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
