"""A few answers beside their references."""

from __future__ import annotations

import json
from typing import Any

from samples import samples_of, update

from collie_metrics.decode import Decode


def rows(metric: Decode) -> list[dict[str, Any]]:
    return [json.loads(line) for line in metric.details()["decode"].split("\n")]


def test_rows_are_whole_and_as_many_as_asked() -> None:
    samples = samples_of("translations")
    kept = rows(update(Decode(rows=5), samples))
    assert len(kept) == 5
    assert all((row["prediction"], row["targets"]) in samples for row in kept)
    assert len(rows(update(Decode(rows=100), samples))) == len(samples)
    assert "小狗" in update(Decode(rows=100), samples).details()["decode"]  # to be read, not escaped


def test_the_same_samples_are_shown_at_every_evaluation() -> None:
    samples = samples_of("translations")
    better = [(f"{prediction} Now better.", targets) for prediction, targets in samples]
    before, after = (rows(update(Decode(rows=4), found)) for found in (samples, better))
    assert [row["targets"] for row in before] == [row["targets"] for row in after]


def test_classes_show_each_kind_of_answer_once() -> None:
    samples = [(said, [wanted]) for said, wanted in (("yes", "yes"), ("yes", "no"), ("no", "yes"), ("no", "no"))]
    kept = rows(update(Decode(rows=10), samples * 20))
    assert len(kept) == 4
    first = rows(update(Decode(rows=2), samples * 20))
    assert {row["targets"][0] for row in first} == {"yes", "no"}  # of different references first


def test_the_mean_length() -> None:
    assert update(Decode(rows=1), [("", ["x"]), ("äöü", ["x"])]).compute() == {"decode_characters": 1.5}
