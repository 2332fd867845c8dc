"""Tokens per second of a CoLLiE run over a bare torch loop and over the transformers Trainer, in one process.

The same llama of 15 million parameters, the same samples (8 x 256 tokens a step), the same fused AdamW and clipping,
float32. The three run in threads of which one at a time may move, a step each in turn, so that a machine whose speed
drifts slows all of them alike. A turn lasts from the end of a contender's step to the end of its next one: whatever it
does between steps counts. The ratios are medians over rounds of three turns.

    python benchmarks/throughput.py [--steps 24] [--write benchmarks/results/throughput.md]
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments
from transformers import Trainer as TransformersTrainer

from collie_core.api import RunConfig, Trainer
from collie_core.report.console import ConsoleReporter
from collie_core.report.html import HtmlReport
from collie_core.report.metrics import MetricsFile

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


class Turns:
    """Lets the contenders move one at a time, a step each, and keeps how long each step took."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.seconds: dict[str, list[float]] = {name: [] for name in names}
        self._began: dict[str, float] = {}
        self._together = threading.Barrier(len(names))
        self._changed = threading.Condition()
        self._current = 0

    def step_ended(self, name: str) -> None:
        """Hand over, and return when it is this contender's turn again. The first call waits for all."""
        if name in self._began:
            self.seconds[name].append(time.perf_counter() - self._began[name])
            self._hand_over()
        else:
            self._together.wait()
        with self._changed:
            self._changed.wait_for(lambda: self.names[self._current] == name)
        self._began[name] = time.perf_counter()

    def left(self, name: str) -> None:
        """A contender has finished: the others go on without it."""
        with self._changed:
            at = self.names.index(name)
            self.names.remove(name)
            self._current = at % max(1, len(self.names))
            self._changed.notify_all()

    def _hand_over(self) -> None:
        with self._changed:
            self._current = (self._current + 1) % len(self.names)
            self._changed.notify_all()


Contender = Callable[[list[dict[str, list[int]]], Callable[[], None]], None]


def bare(rows: list[dict[str, list[int]]], step_ended: Callable[[], None]) -> None:
    """A loop that does only what must be done."""
    model = new_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    for start in range(0, len(rows), BATCH):
        ids = torch.tensor([row["input_ids"] for row in rows[start : start + BATCH]])
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step_ended()


class StepEnd(TrainerCallback):
    """Tells either trainer's steps."""

    def __init__(self, step_ended: Callable[[], None]) -> None:
        self.step_ended = step_ended

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.step_ended()

    def collie_after_step(self) -> None:
        self.step_ended()


def transformers_trainer(rows: list[dict[str, list[int]]], step_ended: Callable[[], None], model: Any = None) -> None:
    """The transformers Trainer over `model`, or the llama all three train, logging nothing."""
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
        model = new_model() if model is None else model
        TransformersTrainer(model, arguments, train_dataset=rows, callbacks=[StepEnd(step_ended)]).train()


def collie(rows: list[dict[str, list[int]]], step_ended: Callable[[], None]) -> None:
    """A CoLLiE run with all it does by default: a log line and a row of metrics.jsonl for every step, a report."""
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w") as log:
        config = RunConfig(
            tokenizer={"type": "byte"},
            data={"max_length": LENGTH},
            train={"num_train_epochs": 1, "per_device_train_batch_size": BATCH, "output_dir": f"{folder}/run"},
            optimizer={"type": "adamw", "lr": 1e-4},
        )
        observers = [ConsoleReporter(Console(file=log)), HtmlReport(), MetricsFile()]
        trainer = Trainer(
            config, model=new_model(), train_dataset=rows, callbacks=[StepEnd(step_ended)], observers=observers
        )
        trainer.train()


CONTENDERS: dict[str, Contender] = {
    "CoLLiE": collie,
    "bare torch loop": bare,
    "transformers Trainer": transformers_trainer,
}


def taking_turns(contenders: Mapping[str, Callable[[Callable[[], None]], None]]) -> dict[str, list[float]]:
    """Seconds of each step of each contender, without the first; each is given what it calls after a step."""
    turns = Turns(list(contenders))

    def take_part(name: str) -> None:
        try:
            contenders[name](lambda: turns.step_ended(name))
        finally:
            turns.left(name)

    threads = [threading.Thread(target=take_part, args=(name,)) for name in contenders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {name: seconds[WARM_UP - 1 :] for name, seconds in turns.seconds.items()}


def table(seconds: dict[str, list[float]]) -> str:
    """Markdown: tokens per second, and the median over rounds of CoLLiE's speed over the other's."""
    lines = ["| | ms per step | tokens/s | CoLLiE's speed over it |", "|---|--:|--:|--:|"]
    for name, steps in seconds.items():
        median = statistics.median(steps)
        ratios = [other / ours for other, ours in zip(steps, seconds["CoLLiE"], strict=True)]
        ratio = "" if name == "CoLLiE" else f"{statistics.median(ratios):.3f}"
        lines.append(f"| {name} | {median * 1e3:.0f} | {BATCH * LENGTH / median:.0f} | {ratio} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--write", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    rows = samples(args.steps + WARM_UP)
    seconds = taking_turns({name: partial(contender, rows) for name, contender in CONTENDERS.items()})
    parameters = sum(parameter.numel() for parameter in new_model().parameters())
    text = (
        f"{parameters / 1e6:.1f} M parameters, {BATCH} x {LENGTH} tokens a step, float32, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, {args.steps} steps\n\n"
        f"{table(seconds)}\n"
    )
    print(text)
    if args.write:
        args.write.parent.mkdir(parents=True, exist_ok=True)
        args.write.write_text(text)


if __name__ == "__main__":
    main()
