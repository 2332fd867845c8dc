"""Adapters: LoRA here against the transformers Trainer with peft, and every method beside the others.

First, LoRA of rank 8 on all linear layers of a llama of 15 million parameters, 8 x 256 tokens a step, the same samples,
fused AdamW and clipping, float32. For speed both run in processes of which one at a time may move, a step each in turn,
so that a machine whose speed drifts slows both alike; the ratio is the median over rounds. For memory each runs once
more, three steps under torch's profiler, which sees every tensor come and go.

Then every method on a model of one million parameters that has learned the shipped questions for a while, a process for
each: parameters that are trained, speed, memory, and the mean loss of the last steps.

    python benchmarks/adapters.py [--steps 24] [--write benchmarks/results/adapters.md]

Exit code 1 when LoRA here is slower than there by more than noise, or takes more memory.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import torch
from throughput import BATCH, LENGTH, WARM_UP, StepEnd, new_model, samples, taking_turns, transformers_trainer
from torch.profiler import ProfilerActivity, profile

from collie_core.api import RunConfig, Trainer
from collie_core.data.tokenizer import byte_tokenizer

ROOT = Path(__file__).resolve().parents[1]
NOISE = 1.03
SHORT = 10  # steps of a method under the profiler: AdaLoRA needs some for its schedule
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": LINEAR}
METHODS: dict[str, dict[str, Any] | None] = {
    "full fine-tuning": None,
    "lora": {"type": "lora", **LORA},
    "lora, DoRA": {"type": "lora", "use_dora": True, **LORA},
    "adalora": {"type": "adalora", "init_r": 12, "target_r": 8, "tinit": 3, "tfinal": 6, "target_modules": LINEAR},
    "ia3": {"type": "ia3"},
    "bottleneck, houlsby": {"type": "bottleneck"},
    "bottleneck, pfeiffer": {"type": "bottleneck", "placement": "pfeiffer"},
    "prompt_tuning": {"type": "prompt_tuning"},
    "p_tuning": {"type": "p_tuning"},
    "prefix_tuning": {"type": "prefix_tuning"},
    "prefix_tuning, projection": {"type": "prefix_tuning", "prefix_projection": True},
    "llama_adapter": {"type": "llama_adapter", "adapter_layers": 4},
}
LEARNING_RATES = {"full fine-tuning": 1e-3, "prompt_tuning": 3e-2, "p_tuning": 3e-3}  # of the others: 1e-2
Rows = list[dict[str, list[int]]]


def write_base(folder: str) -> None:
    """The model of the comparison, with a tokenizer."""
    new_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def by_collie(base: str, rows: Rows, step_ended: Callable[[], None]) -> None:
    """A CoLLiE run that reports as by default, but to files alone."""
    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig(
            model={"model_name_or_path": base},
            data={"max_length": LENGTH},
            train={"num_train_epochs": 1, "per_device_train_batch_size": BATCH, "output_dir": f"{folder}/run"},
            optimizer={"type": "adamw", "lr": 1e-4},
            adapter={"type": "lora", **LORA},
        )
        Trainer(config, train_dataset=rows, callbacks=[StepEnd(step_ended)], observers=()).train()


OURS, THEIRS = "CoLLiE", "transformers Trainer, peft"


def contender(name: str, base: str, rows: Rows) -> Callable[[Callable[[], None]], None]:
    """What runs one of them."""
    if name == OURS:
        return partial(by_collie, base, rows)
    return partial(transformers_trainer, rows, model=with_lora)


def with_lora() -> Any:
    """The model of the comparison as peft makes it."""
    return peft.get_peft_model(new_model(), peft.LoraConfig(task_type="CAUSAL_LM", **LORA))


def in_process(work: Callable[[], Any]) -> Any:
    """What `work` returns in a process of its own."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(work()))
    process.start()
    sender.close()
    result = receiver.recv()
    process.join()
    return result


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most memory that tensors have at once in `work`, as torch's allocator counts it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    with tempfile.TemporaryDirectory() as folder:
        profiled.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(f"{folder}/trace.json").read_text())["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]")


def compare(base: str, steps: int) -> tuple[list[str], bool]:
    """Lines of the first table, and whether the target is met."""
    rows = samples(steps + WARM_UP)
    few = rows[: 3 * BATCH]
    names = (OURS, THEIRS)
    peaks = {
        name: in_process(lambda name=name: peak_bytes(lambda: contender(name, base, few)(lambda: None)))
        for name in names
    }
    seconds = taking_turns({name: contender(name, base, rows) for name in names}, steps, threads=1)
    speed = statistics.median(other / own for own, other in zip(seconds[OURS], seconds[THEIRS], strict=True))
    memory = peaks[THEIRS] / peaks[OURS]
    lines = ["| LoRA r 8 | ms per step | tokens/s | peak MiB | speed | memory |", "|---|--:|--:|--:|--:|--:|"]
    for name, own in seconds.items():
        median = statistics.median(own)
        ratios = f"{speed:.3f} | {memory:.3f}" if name != OURS else " | "
        tokens = BATCH * LENGTH / median
        lines.append(f"| {name} | {median * 1e3:.0f} | {tokens:.0f} | {peaks[name] / 2**20:.0f} | {ratios} |")
    return lines, speed * NOISE >= 1 and memory * NOISE >= 1


class Watch:
    """Keeps the losses and the time of the steps after the first two."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.tokens = 0
        self.began = 0.0
        self.seconds = 0.0

    def collie_before_step(self, batch: Any) -> None:
        """See `Hooks`."""
        if len(self.losses) == WARM_UP:
            self.began = time.perf_counter()
        if len(self.losses) >= WARM_UP:
            self.tokens += batch.tokens

    def collie_after_step(self, loss: torch.Tensor) -> None:
        """See `Hooks`."""
        self.losses.append(loss.item())
        self.seconds = time.perf_counter() - self.began


def learn(base: str, output: str, steps: int, name: str) -> dict[str, float]:
    """Fine-tune a base model by a method."""
    section = METHODS[name]
    config = RunConfig(
        model={"model_name_or_path": base},
        data={"train": str(ROOT / "examples/data/quickstart_train.jsonl"), "max_length": 128},
        train={"max_steps": steps, "per_device_train_batch_size": 16, "output_dir": output, "seed": 7},
        optimizer={"type": "adamw", "lr": LEARNING_RATES.get(name, 1e-2)},
        lr_scheduler={"type": "cosine", "warmup_ratio": 0.1},
        **({} if section is None else {"adapter": section}),
    )
    watch = Watch()
    trainer = Trainer(config, callbacks=[watch], observers=())
    trainer.train()
    every, trained = trainer.parts.parameter_counts
    last = watch.losses[-10:]
    return {"share": trained / every, "speed": watch.tokens / watch.seconds, "loss": sum(last) / len(last)}


def pretrain(output: str, steps: int) -> Path:
    """The model of the quickstart, after fewer steps than it needs."""
    config = RunConfig.from_yaml(
        str(ROOT / "examples/quickstart.yaml"),
        overrides=[
            f"train.max_steps={steps}",
            f"train.output_dir={output}",
            f"data.train={ROOT}/examples/data/quickstart_train.jsonl",
            "data.eval=[]",
            "evaluation={}",
        ],
    )
    Trainer(config, observers=()).train()
    return Path(output) / "model"


def methods(folder: str, steps: int) -> list[str]:
    """Lines of the second table."""
    base = in_process(partial(pretrain, f"{folder}/base", 150))
    lines = [
        f"| method | trained parameters | tokens/s | peak MiB | loss after {steps} steps |",
        "|---|--:|--:|--:|--:|",
    ]
    for number, name in enumerate(METHODS):
        found = in_process(partial(learn, str(base), f"{folder}/{number}", steps, name))
        short = partial(learn, str(base), f"{folder}/{number}-short", SHORT, name)
        peak = in_process(partial(peak_bytes, short))
        lines.append(
            f"| {name} | {found['share']:.2%} | {found['speed']:.0f} | {peak / 2**20:.0f} | {found['loss']:.3f} |"
        )
        print(lines[-1], file=sys.stderr)
    return lines


def main() -> int:
    """Exit code: 0 when the target is met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24, help="of each contender")
    parser.add_argument("--method-steps", type=int, default=100, help="of each method")
    parser.add_argument("--write", type=Path, help="also write the tables to this file")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)  # a process that forks has no threads of its own that children would wait for
    with tempfile.TemporaryDirectory() as folder:
        table = methods(folder, args.method_steps)
        write_base(f"{folder}/llama")
        compared, met = compare(f"{folder}/llama", args.steps)
    facts = f"{os.cpu_count()} cores, 1 thread, float32, torch {torch.__version__}, peft {version('peft')}"
    text = "\n".join([facts, "", *compared, "", *table, ""])
    print(text)
    if args.write:
        args.write.parent.mkdir(parents=True, exist_ok=True)
        args.write.write_text(text)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
