"""The number of an answer, as GSM8K and models write it."""

from __future__ import annotations

import json
from decimal import Decimal

import pytest
from samples import DATA, samples_of, update

from collie_metrics.numeric_match import NumericMatch, number_in


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 42", "42"),
        ("6 * 7 = 42\n#### 42 eggs, or 3 boxes", "42"),
        ("#### 1\n#### 2", "2"),
        ("It was 5, then 7.", "7"),
        ("1,234,567.80 dollars", "1234567.8"),
        ("$1,000", "1000"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("€ 2.50", "2.5"),
        ("\N{MINUS SIGN}3", "-3"),
        ("= -3", "-3"),
        ("(-3)", "-3"),
        ("10-5", "5"),
        ("10 - 5", "5"),
        ("page-5", "5"),
        ("50%", "50"),
        ("12.5 %", "12.5"),
        ("1,2", "2"),
        ("1, 2, 3", "3"),
        ("1,2345", "2345"),
        (".5", "0.5"),
        ("-.5", "-0.5"),
        ("7.", "7"),
        ("7km", "7"),
        ("\\boxed{18}", "18"),
        ("**18**", "18"),
        ("007", "7"),
        ("\uff14\uff12", "42"),
        ("٤٢", "42"),
        ("no number", None),
        ("", None),
        ("5 ####", None),
        ("#### five", None),
    ],
)
def test_the_number_of_a_text(text: str, number: str | None) -> None:
    assert number_in(text) == (None if number is None else Decimal(number))


def test_the_marker() -> None:
    assert number_in("Answer: 5, since 2 + 3", marker="Answer:") == 5
    assert number_in("#### 5, since 2 + 3", marker=None) == 3
    assert number_in("It is 5", require_marker=True) is None


@pytest.mark.parametrize("row", [json.loads(line) for line in (DATA / "sums.jsonl").read_text("utf-8").splitlines()])
def test_answers_are_right_or_wrong(row: dict[str, object]) -> None:
    numbers = update(NumericMatch(), [(row["prediction"], row["targets"])]).compute()
    assert numbers["numeric_match"] == float(bool(row["right"]))


def test_shares() -> None:
    samples = samples_of("sums")
    assert update(NumericMatch(), samples).compute() == {"numeric_match": 7 / 10, "numeric_match_answered": 8 / 10}
    strict = update(NumericMatch(require_marker=True), samples).compute()
    assert strict == {"numeric_match": 2 / 10, "numeric_match_answered": 2 / 10}


@pytest.mark.parametrize(
    ("prediction", "tolerance", "right"),
    [
        ("0.1", 0, True),
        ("0.10000000000000000000000000000000000000000000000000000000001", 0, False),  # no rounding anywhere
        ("0.11", 0.1, True),
        ("0.09", 0.1, True),
        ("0.1100001", 0.1, False),
        ("-0.1", 0.5, False),
        ("9" * 5000, 0.5, False),  # longer than Python turns into an integer
    ],
)
def test_how_near_it_must_come(prediction: str, tolerance: float, right: bool) -> None:
    assert update(NumericMatch(tolerance=tolerance), [(prediction, ["0.1"])]).compute()["numeric_match"] == right


def test_a_target_without_a_number_is_an_error_and_changes_nothing() -> None:
    metric = NumericMatch()
    with pytest.raises(ValueError, match=r"targets\[1\]='Paris' has no number: use another metric for such data"):
        metric.update(["1", "Paris"], [["1"], ["Paris"]])
    assert metric.samples == 0
    assert update(metric, [("1", ["one", "1"])]).compute()["numeric_match"] == 1
