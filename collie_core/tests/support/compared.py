"""Comparisons without a model: the runs are functions that leave what a run leaves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from collie_core.compare.folder import Folder, write_whole
from collie_core.compare.grid import Asked, Cell, Grid, Pair

STEP_S = 0.5
TOKENS = 100  # of each step

FILE = """
model: {model_name_or_path: somewhere}
data: {train: rows.jsonl, eval: rows.jsonl}
train: {max_steps: 3, seed: 7}
optimizer: {type: adamw, lr: 3.0e-4, betas: [0.8, 0.9]}
"""


def asked(folder: Path, overrides: Sequence[str] = (), **options: Any) -> Asked:
    """For `FILE`, in a folder."""
    path = folder / "run.yaml"
    path.write_text(FILE)
    options = {"optimizers": ["adamw", "sgd"], "adapters": ["none"], "rates": {}, "seeds": []} | options
    return Asked(config=str(path), overrides=overrides, output=folder / "compared", **options)


def grid_of(base: Grid, pairs: Sequence[Pair], rates: Sequence[float] = (1e-3,), seeds: Sequence[int] = (1,)) -> Grid:
    """Of the base of another one, with pairs that need not be installed."""
    cells = tuple(Cell(pair, lr, seed, ()) for pair in pairs for lr in rates for seed in seeds)
    return Grid(base.base, (), tuple(pairs), cells, ())


def rows_of(losses: Sequence[float | None], evaluated: Sequence[float | None] = ()) -> list[dict[str, Any]]:
    """Of metrics.jsonl: a row for each step, and one for the evaluation after it."""
    rows: list[dict[str, Any]] = []
    for at, loss in enumerate(losses):
        speed = {"tokens_per_second": TOKENS / STEP_S, "step_time_s": STEP_S, "peak_memory_bytes": 2**20 * (at + 1)}
        rows.append({"step": at + 1, "epoch": 0.1, "loss": loss, "tokens": TOKENS * (at + 1), **speed})
        if at < len(evaluated):
            rows.append({"step": at + 1, "epoch": 0.1, "eval/loss": evaluated[at]})
    return rows


def write_run(run: Path, rows: Sequence[dict[str, Any]]) -> None:
    """What a run leaves that has come to an end."""
    (run / "model").mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_cell(folder: Folder, cell: Cell, rows: Sequence[dict[str, Any]], status: str = "done", why: str = "") -> None:
    """A cell that stands."""
    write_run(folder.run(cell), rows)
    write_whole(folder.result(cell), {"status": status, "reason": why, "seconds": 2.5})
