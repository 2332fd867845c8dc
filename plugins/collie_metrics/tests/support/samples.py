"""Samples of the files beside these tests, and metrics over any split of them."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[1] / "data"
Sample = tuple[Any, Any]  # prediction, target


def samples_of(name: str, target: str = "targets") -> list[Sample]:
    """Of a file in `data/`."""
    rows = map(json.loads, (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines())
    return [(row["prediction"], row[target]) for row in rows]


def update(metric: Any, samples: Sequence[Sample]) -> Any:
    """The metric after one batch."""
    metric.update([prediction for prediction, _ in samples], [target for _, target in samples])
    return metric


def on_ranks(make: Callable[[], Any], ranks: Iterable[Iterable[Sequence[Sample]]]) -> Any:
    """The metric of rank 0 after it has merged the others, each of which saw its batches and was sent as it is."""
    metrics = []
    for batches in ranks:
        metric = make()
        for batch in batches:
            update(metric, batch)
        metrics.append(metric)
    first, *others = pickle.loads(pickle.dumps(metrics))  # noqa: S301 - made a line before
    for other in others:
        before = pickle.dumps(other)
        first.merge(other)
        assert pickle.dumps(other) == before, "merge changed the other"
    return first


def outcome(metric: Any) -> str:
    """All that a metric has to say, to the last bit, NaN included."""
    return repr((dict(metric.compute()), dict(metric.details()) if hasattr(metric, "details") else {}))
