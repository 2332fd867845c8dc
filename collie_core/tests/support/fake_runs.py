"""A run that the observers can watch without training anything."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from collie_core.generate import SampleText
from collie_core.hookspecs import Run
from collie_core.plugins import Plugins

CONFIG = "model:\n  config: {model_type: llama}\ntrain:\n  max_steps: 3\n"
FACTS = {
    "model": "llama",
    "parameters": 1_062_400,
    "trainable_parameters": 10_624,
    "precision": "float32",
    "device": "CPU",
    "engine": "torch",
    "optimizer": "adamw",
    "global_batch_size": 32,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 2,
    "data_parallel_size": 1,
    "max_steps": 3,
    "epochs": 1.5,
    "train_samples": 2000,
    "train_tokens": 91_402,
    "eval_samples": 100,
    "better": {"eval/loss": "min", "eval/perplexity": "min"},
    "data_notes": ["3 samples were longer than 128 tokens and truncated"],
    "plugins": ["llama (collie-llama 0.1.0)"],
    "sample": [("Spell [red]cat[/red].", False), ("c-a-t", True)],
}


def make_run(output_dir: Path, max_steps: int = 3) -> Run:
    """A run as hooks see it; the config knows where it writes and how it is written down."""
    config = SimpleNamespace(
        to_yaml=lambda: CONFIG,
        report_to=[],
        train=SimpleNamespace(output_dir=str(output_dir), overwrite_output_dir=False, monitors=[]),
        evaluation=SimpleNamespace(best=None),
        registry=Plugins.discover(),
        model_dump=lambda mode: yaml.safe_load(CONFIG),
    )
    nothing: Any = None
    return Run(config, nothing, nothing, output_dir, max_steps, facts=dict(FACTS))  # type: ignore[arg-type]


def tell(observers: Sequence[object], hook: str, **arguments: Any) -> None:
    """Call a hook of each observer, last first and with the arguments it names, as pluggy does."""
    for observer in reversed(observers):
        method = getattr(observer, hook, None)
        if method is not None:
            method(**{name: arguments[name] for name in inspect.signature(method).parameters})


def row(run: Run, **changes: Any) -> dict[str, Any]:
    """A row of metrics at the run's step."""
    values = {
        "step": run.step,
        "epoch": run.step / 2,
        "loss": 4 / run.step,
        "learning_rate": 3e-4,
        "grad_norm": 1.5,
        "tokens": 4000 * run.step,
        "tokens_per_second": 12_345.6,
        "step_time_s": 0.3,
        "peak_memory_bytes": 3 * 2**30,
    }
    return values | changes


def save_model(observers: Sequence[object], run: Run) -> None:
    """An export of a whole model."""
    (run.output_dir / "model").mkdir(parents=True, exist_ok=True)
    (run.output_dir / "model" / "config.json").write_text("{}")
    tell(observers, "collie_checkpoint_saved", run=run, path=run.output_dir / "model")


def play(observers: Sequence[object], run: Run, error: BaseException | None = None) -> None:
    """A whole run: `max_steps` logged steps, an evaluation, an export."""
    tell(observers, "collie_run_start", run=run)
    for step in range(1, run.max_steps + 1):
        run.step = step
        tell(observers, "collie_after_step", run=run, loss=None)
        tell(observers, "collie_metrics", run=run, values=row(run))
    results = {"eval/loss": 1.25, "eval/perplexity": math.exp(1.25)}
    samples = [
        SampleText("What does a cow say?", "Moo.", "Moo."),
        SampleText("Spell cat.", "c-a-t", "c-a\nr"),
    ]
    tell(observers, "collie_evaluated", run=run, results=results, samples=samples)
    if error is None:
        save_model(observers, run)
    tell(observers, "collie_run_end", run=run, error=error)
