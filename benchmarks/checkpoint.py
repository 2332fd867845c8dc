"""Checkpoints: how long the training waits for one, how large it is, and how long it takes to come back.

A llama of 50 million parameters in float32 with AdamW, in one process under DeepSpeed's ZeRO-1, so that the same engine
can write both: CoLLiE's checkpoint, `engine.save_checkpoint` and `torch.save` of the same tensors, by turns after the
steps of one run, each into its own folder of one disk. CoLLiE's waits for the copy in host memory; how much slower
steps are while a thread writes is told beside it. Then the newest of each is read again: CoLLiE's with every digest
compared, DeepSpeed's by `load_checkpoint`, both into the engine.

    python benchmarks/checkpoint.py [--rounds 5] [--write benchmarks/results/checkpoint.md]

Exit code 1 when the stall is above 0.25 of DeepSpeed's, the size above 1.02 of the tensors, or loading above 1.0.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from collie_core.api import RunConfig, Trainer
from collie_core.checkpoint import files
from collie_core.checkpoint.choose import newest_sound

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 640,
    "intermediate_size": 1728,
    "num_hidden_layers": 9,
    "num_attention_heads": 10,
    "num_key_value_heads": 10,
    "vocab_size": 4096,
    "max_position_embeddings": 256,
}
MOST_STALL, MOST_BYTES, MOST_LOADING = 0.25, 1.02, 1.0
OURS, DEEPSPEED, TORCH = "CoLLiE", "DeepSpeed", "torch.save"
EVERY = 4  # steps between two saves, so that each begins with a disk that is idle


class Turns:
    """Saves by one of the three after some steps, and keeps the seconds of everything."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.trainer: Any = None
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.newest: dict[str, Path] = {}
        self._began = 0.0

    def collie_before_step(self, run: Any) -> None:
        self._began = time.perf_counter()

    def collie_after_step(self, run: Any) -> None:
        writes = self.trainer.checkpoints.saver._thread
        busy = writes is not None and writes.is_alive()
        self.seconds["a step beside the writer" if busy else "a step"].append(time.perf_counter() - self._began)
        turn, place = divmod(run.step, EVERY)
        if place == 0:
            self._save((OURS, DEEPSPEED, TORCH)[turn % 3], run)

    def _save(self, by: str, run: Any) -> None:
        trainer, engine = self.trainer, self.trainer.parts.step.engine
        target = self.folder / by / str(run.step)
        target.parent.mkdir(exist_ok=True)
        trainer.checkpoints.saver.wait()
        os.sync()
        began = time.perf_counter()
        if by == OURS:
            trainer.checkpoints.save(run, {}, {})
        elif by == DEEPSPEED:
            engine.save_checkpoint(str(target))
        else:
            torch.save(
                {"model": engine.module.state_dict(), "optimizer": engine.optimizer.optimizer.state_dict()}, target
            )
        self.seconds[f"save by {by}"].append(time.perf_counter() - began)
        if by == OURS:
            trainer.checkpoints.saver.wait()
            self.seconds["on the disk by CoLLiE"].append(time.perf_counter() - began)
            target = trainer.checkpoints.folder / files.folder_name(run.step)
        self.newest[by] = target

    def load(self, rounds: int) -> None:
        """Read the newest of each again, into the engine."""
        trainer, engine = self.trainer, self.trainer.parts.step.engine
        with self._timed(rounds, f"load by {OURS}") as again:
            again(trainer.checkpoints.go_back)
        with self._timed(rounds, f"load by {DEEPSPEED}") as again:
            again(lambda: engine.load_checkpoint(str(self.newest[DEEPSPEED])))
        with self._timed(rounds, f"load by {TORCH}") as again:
            again(lambda: torch.load(self.newest[TORCH]))

    @contextmanager
    def _timed(self, rounds: int, name: str) -> Any:
        def again(work: Callable[[], Any]) -> None:
            for _ in range(rounds):
                began = time.perf_counter()
                work()
                self.seconds[name].append(time.perf_counter() - began)

        yield again


def measure(rounds: int) -> tuple[Turns, float, float]:
    """The seconds, and the bytes of CoLLiE's checkpoint and of the tensors in it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = RunConfig(
            model={"config": MODEL},
            tokenizer="byte",
            data={"max_length": 64, "cache_dir": str(folder / "cache")},
            parallel={"zero_stage": 1},
            train={
                "max_steps": 3 * EVERY * (rounds + 1),
                "per_device_train_batch_size": 4,
                "output_dir": str(folder / "run"),
            },
            checkpoint={"save_total_limit": 1, "save_steps": 10**9},
        )
        turns = Turns(folder)
        rows = [{"text": "the quick brown fox jumps over the lazy dog " * 2}] * 64

        class Before:
            """Loads before the run ends, while the engine is there."""

            def collie_after_step(self, run: Any) -> None:
                if run.step == run.max_steps:
                    turns.load(rounds)
                    sizes.append(float(files.read_manifest(newest_sound(trainer.checkpoints.folder)).nbytes))
                    sizes.append(12.0 * sum(value.numel() for value in trainer.model.parameters()))

        sizes: list[float] = []
        trainer = turns.trainer = Trainer(config, train_dataset=rows, callbacks=[Before(), turns], observers=())
        trainer.train()
    return turns, sizes[0], sizes[1]


def report(turns: Turns, size: float, tensors: float) -> tuple[str, bool]:
    """The tables, and whether all bars are met."""
    seconds = {name: statistics.median(found[1:] if "save" in name else found) for name, found in turns.seconds.items()}
    step = seconds["a step"]
    stall = seconds[f"save by {OURS}"] / seconds[f"save by {DEEPSPEED}"]
    loading = seconds[f"load by {OURS}"] / seconds[f"load by {DEEPSPEED}"]
    beside = seconds.get("a step beside the writer", step) / step
    first = {by: turns.seconds[f"save by {by}"][0] * 1e3 for by in (OURS, DEEPSPEED)}
    lines = [
        f"{os.cpu_count()} cores, 1 thread, float32, {tensors / 12 / 1e6:.1f} M parameters, torch {torch.__version__}, "
        f"DeepSpeed {version('deepspeed')}",
        "",
        "| | the training waits, ms | of DeepSpeed's | of a step | load, ms | of DeepSpeed's |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for by in (OURS, DEEPSPEED, TORCH):
        save, load = seconds[f"save by {by}"], seconds[f"load by {by}"]
        lines.append(
            f"| {by} | {save * 1e3:.0f} | {save / seconds[f'save by {DEEPSPEED}']:.2f} | {save / step:.2f} "
            f"| {load * 1e3:.0f} | {load / seconds[f'load by {DEEPSPEED}']:.2f} |"
        )
    lines += [
        "",
        f"The first one, which takes new memory, waits {first[OURS]:.0f} ms, DeepSpeed's first {first[DEEPSPEED]:.0f} "
        f"ms. CoLLiE's is on the disk after {seconds['on the disk by CoLLiE'] * 1e3:.0f} ms; a step takes "
        f"{step * 1e3:.0f} ms, and beside the writer {beside:.2f} times that. {size / 1e6:.1f} MB on the disk are "
        f"{size / tensors:.4f} of its tensors.",
    ]
    return "\n".join(lines) + "\n", stall <= MOST_STALL and size / tensors <= MOST_BYTES and loading <= MOST_LOADING


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    text, met = report(*measure(arguments.rounds))
    print(text)
    if arguments.write:
        arguments.write.write_text(text)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
