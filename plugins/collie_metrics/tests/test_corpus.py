"""BLEU and chrF are sacrebleu's, to the last bit."""

from __future__ import annotations

import logging
from itertools import zip_longest
from typing import Any

import pytest
import sacrebleu
from samples import Sample, samples_of, update

from collie_metrics.bleu import Bleu
from collie_metrics.chrf import Chrf

SETS = {name: samples_of(name) for name in ("translations", "summaries")}


def by_sacrebleu(scorer: Any, samples: list[Sample]) -> tuple[float, str, str]:
    """Score, line and signature of the corpus; texts as sacrebleu wants them, reference by reference."""
    streams = list(zip_longest(*(references for _, references in samples)))
    score = scorer.corpus_score([prediction for prediction, _ in samples], streams)
    return score.score, score.format(), str(scorer.get_signature())


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lowercase": True, "tokenize": "intl"},
        {"tokenize": "zh"},
        {"tokenize": "char"},
        {"tokenize": "none", "smooth_method": "none"},
        {"smooth_method": "floor"},
        {"smooth_method": "floor", "smooth_value": 0.5},
        {"smooth_method": "add-k", "max_ngram_order": 6},
        {"effective_order": True, "max_ngram_order": 2},
    ],
)
def test_bleu_is_that_of_sacrebleu(name: str, options: dict[str, Any]) -> None:
    score, line, signature = by_sacrebleu(sacrebleu.BLEU(**options), SETS[name])
    metric = update(Bleu(**options), SETS[name])
    for _ in range(2):  # smoothing must not stay in the counts
        assert metric.compute() == {"bleu": score}
        assert metric.details() == {"bleu": line, "bleu_signature": signature}


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"word_order": 2},
        {"word_order": 2, "eps_smoothing": True, "whitespace": True},
        {"char_order": 4, "beta": 3, "lowercase": True},
    ],
)
def test_chrf_is_that_of_sacrebleu(name: str, options: dict[str, Any]) -> None:
    score, line, signature = by_sacrebleu(sacrebleu.CHRF(**options), SETS[name])
    metric = update(Chrf(**options), SETS[name])
    assert metric.compute() == {"chrf": score}
    assert metric.details() == {"chrf": line, "chrf_signature": signature}


def test_the_signature_says_how_many_references_there_are() -> None:
    one, two = [("a", ["a"])], [("a b", ["a", "b"])]
    metric = update(update(Bleu(), one), one)
    assert metric.details()["bleu_signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert update(Chrf(), two).details()["chrf_signature"].startswith("nrefs:2|")
    metric.merge(update(Bleu(), two))
    assert metric.details()["bleu_signature"].startswith("nrefs:var|")


def test_bleu_by_hand() -> None:
    """Of 6, 5, 4 and 3 n-grams 5, 3, 1 and 0 are in the reference; half of one stands for the none."""
    metric = update(Bleu(), [("the cat sat on the mat", ["the cat is on the mat"])])
    assert metric.compute()["bleu"] == pytest.approx(100 * (5 / 6 * 3 / 5 * 1 / 4 * (1 / 2) / 3) ** 0.25, rel=1e-12)
    assert update(Bleu(), [("a b c d e", ["a b c d e"])]).compute()["bleu"] == pytest.approx(100, rel=1e-12)
    assert update(Bleu(), [("", ["a b c d e"])]).compute()["bleu"] == 0


def test_bleu_is_of_the_corpus_and_not_a_mean() -> None:
    samples = [("a b c d", ["a b c d"]), ("e f g h", ["i j k l"])]
    counts = 4 / 8, 3 / 6, 2 / 4, 1 / 2  # together half of each order is right
    assert update(Bleu(), samples).compute()["bleu"] == pytest.approx(100 * counts[0], rel=1e-12)


def test_chrf_by_hand() -> None:
    """Both letters of four: precision 1, recall 1/2, and recall counts twice."""
    metric = update(Chrf(char_order=1), [("ab", ["abcd"])])
    assert metric.compute()["chrf"] == pytest.approx(100 * 5 * 0.5 / (4 * 1 + 0.5), rel=1e-12)


def test_texts_are_compared_as_they_are() -> None:
    """One word, its accent encoded in two ways: nothing brings them together."""
    samples = [("caf\u00e9", ["cafe\u0301"])]
    assert update(Bleu(), samples).compute()["bleu"] == 0
    assert update(Chrf(char_order=1), samples).compute()["chrf"] == pytest.approx(
        100 * 5 * 0.75 * 0.6 / (4 * 0.75 + 0.6)
    )


def test_batches_of_tokenised_texts_are_no_reason_to_warn(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="sacrebleu"):
        update(Bleu(), [("a b c d .", ["a b c d ."])] * 200)
    assert not caplog.records
