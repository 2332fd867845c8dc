"""Accuracy, and precision, recall and F1: scikit-learn's definitions, without scikit-learn."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from samples import Sample, samples_of, update

from collie_metrics.accuracy import Accuracy
from collie_metrics.f1 import F1
from collie_metrics.f1_config import F1Config

TOPICS = samples_of("topics", target="target")
LABELS = ["sport", "business", "politics", "science"]


def by_sklearn(samples: list[Sample], **options: Any) -> dict[str, float]:
    """The numbers as `F1` names them."""
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not there to compare with")
    targets, predictions = [target for _, target in samples], [prediction for prediction, _ in samples]
    numbers: dict[str, float] = {}
    for average in ("micro", "macro", "weighted"):
        found = metrics.precision_recall_fscore_support(
            targets, predictions, average=average, zero_division=0, **options
        )
        numbers |= {f"{name}_{average}": found[place] for place, name in enumerate(("precision", "recall", "f1"))}
    return numbers


def test_topics_are_counted_as_by_sklearn() -> None:
    assert update(F1(), TOPICS).compute() == pytest.approx(by_sklearn(TOPICS), rel=1e-12)


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("abcd")), min_size=1, max_size=30))
@settings(max_examples=25)
def test_any_classes_are_counted_as_by_sklearn(samples: list[Sample]) -> None:
    assert update(F1(), samples).compute() == pytest.approx(by_sklearn(samples), rel=1e-12, abs=1e-15)
    accuracy = pytest.importorskip("sklearn.metrics").accuracy_score(*zip(*samples, strict=True))
    assert update(Accuracy(), samples).compute()["accuracy"] == pytest.approx(accuracy, rel=1e-12)


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.sampled_from("abc")), min_size=1, max_size=30))
@settings(max_examples=25)
def test_labels_are_those_of_sklearn(samples: list[Sample]) -> None:
    labels = ["a", "b", "c", "d"]  # d is never a target, and e is none of them
    numbers = update(F1(labels=labels), samples).compute()
    unknown = sum(prediction == "e" for prediction, _ in samples) / len(samples)
    expected = by_sklearn(samples, labels=labels) | {"unknown_predictions": unknown}
    assert numbers == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_by_hand() -> None:
    samples = [("a", "a"), ("a", "b"), ("b", "b"), ("b", "b")]
    numbers = update(F1(positive="b"), samples).compute()
    expected = {
        "precision_micro": 3 / 4, "recall_micro": 3 / 4, "f1_micro": 3 / 4,
        "precision_macro": (1 / 2 + 1) / 2, "recall_macro": (1 + 2 / 3) / 2, "f1_macro": (2 / 3 + 4 / 5) / 2,
        "precision_weighted": (1 / 2 + 3 * 1) / 4, "recall_weighted": (1 + 3 * 2 / 3) / 4,
        "f1_weighted": (2 / 3 + 3 * 4 / 5) / 4,
        "precision": 1, "recall": 2 / 3, "f1": 4 / 5,
    }  # fmt: skip
    assert numbers == pytest.approx(expected, rel=1e-12)
    assert update(Accuracy(), samples).compute() == {"accuracy": 3 / 4}
    assert update(Accuracy(), TOPICS).compute() == {"accuracy": 7 / 11}


def test_averages_come_alone_when_asked_for() -> None:
    assert set(update(F1(average=["macro"]), TOPICS).compute()) == {"precision_macro", "recall_macro", "f1_macro"}


def test_a_class_that_nobody_names_is_zero_and_not_an_error() -> None:
    numbers = update(F1(average=["macro", "weighted"], labels=[0, 1], positive=1), [(0, 0)]).compute()
    assert (numbers["f1"], numbers["f1_macro"], numbers["f1_weighted"]) == (0, 0.5, 1)


def test_predictions_beside_the_labels_are_misses_and_targets_an_error() -> None:
    metric = update(F1(average=["micro"], labels=LABELS), TOPICS)
    assert metric.compute() == pytest.approx(
        {"precision_micro": 7 / 9, "recall_micro": 7 / 11, "f1_micro": 14 / 20, "unknown_predictions": 2 / 11}
    )
    with pytest.raises(ValueError, match=r"target 'weather' is none of labels=\['sport', .*\]: add it to them"):
        metric.update(["sport", "sport"], ["sport", "weather"])
    assert metric.samples == 11


def test_what_a_model_writes_takes_no_room_where_labels_are_declared() -> None:
    metric = F1(labels=[0])
    metric.update([f"a long answer {number}" for number in range(1000)], [0] * 1000)
    assert len(metric.predicted) == 0


def test_the_section() -> None:
    assert F1Config.model_validate({"labels": ["a", 1]}).labels == ["a", 1]
    for wrong, words in [
        ({"labels": ["a", "b", "a"]}, "must name each only once, not a"),
        ({"labels": []}, "at least 1 item"),
        ({"labels": [True]}, "must be a number, not true or false"),
        ({"labels": ["a"], "positive": "b"}, "positive: 'b' must be one of labels"),
        ({"average": ["macro", "macro"]}, "must name each only once, not macro"),
        ({"average": ["binary"]}, "'micro', 'macro' or 'weighted'"),
    ]:
        with pytest.raises(ValidationError, match=words):
            F1Config.model_validate(wrong)
