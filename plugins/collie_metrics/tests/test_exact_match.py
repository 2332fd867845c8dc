"""Exact match, and what makes no difference to it."""

from __future__ import annotations

from typing import Any

import pytest
from samples import samples_of, update

from collie_metrics.exact_match import ExactMatch

SQUAD = {"ignore_case": True, "ignore_punctuation": True, "ignore_articles": True, "ignore_spacing": True}


def matches(prediction: str, reference: str, **options: Any) -> bool:
    return bool(update(ExactMatch(**options), [(prediction, [reference])]).compute()["exact_match"])


@pytest.mark.parametrize(
    ("prediction", "reference", "option"),
    [
        (" 42\n", "42", {"strip": True}),
        ("STRASSE", "Straße", {"ignore_case": True}),
        ("a-b, c!", "ab c", {"ignore_punctuation": True}),
        ("„Ja!“ 你好。", "Ja 你好", {"ignore_punctuation": True}),
        ("3 < 5 + $1", "3  5  1", {"ignore_punctuation": True}),
        ("The cat", "cat", {"ignore_articles": True}),
        ("a  b\nc", "a b c", {"ignore_spacing": True}),
        ("caf\u00e9", "cafe\u0301", {"unicode_form": "NFC"}),
        ("\uff21\uff22\u2460", "AB1", {"unicode_form": "NFKC"}),
    ],
)
def test_each_option_alone_makes_them_equal(prediction: str, reference: str, option: dict[str, Any]) -> None:
    assert not matches(prediction, reference, strip=False)
    if "strip" not in option:
        assert not matches(prediction, reference)
    assert matches(prediction, reference, **option)


def test_articles_are_words() -> None:
    assert matches("the cat", "cat", ignore_articles=True)
    assert matches("The  cat on A mat", "cat on mat", ignore_articles=True, ignore_spacing=True)
    assert not matches("theatre", "atre", ignore_articles=True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Eiffel-Tower,  in an old  city!", "eiffeltower in old city"),
        ("A.", ""),
        ("It's the 'end'.", "its end"),
        ("", ""),
    ],
)
def test_all_together_are_the_normalisation_of_squad(text: str, expected: str) -> None:
    assert ExactMatch(**SQUAD).normalise(text) == expected  # type: ignore[arg-type]


def test_any_reference_counts_and_nothing_is_changed_unasked() -> None:
    samples = [("x", ["y", " x "]), ("X", ["x"]), ("", [""]), ("", ["x"])]
    assert update(ExactMatch(), samples).compute() == {"exact_match": 2 / 4}
    assert update(ExactMatch(), samples_of("translations")).compute() == {"exact_match": 2 / 12}
