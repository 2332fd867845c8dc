"""ROUGE is rouge-score's, and needs no network."""

from __future__ import annotations

import socket
from statistics import fmean
from typing import Any, NoReturn

import nltk
import pytest
from rouge_score.rouge_scorer import RougeScorer
from samples import samples_of, update

from collie_metrics.rouge import CharacterTokenizer, Rouge, WordTokenizer

TYPES = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
SAMPLES = samples_of("summaries")


@pytest.mark.parametrize("use_stemmer", [False, True])
def test_it_is_the_mean_of_rouge_score(use_stemmer: bool) -> None:
    scorer = RougeScorer(TYPES, use_stemmer=use_stemmer)
    best = [scorer.score_multi(references, prediction) for prediction, references in SAMPLES]
    metric = update(Rouge(use_stemmer=use_stemmer, scores=["f1", "precision", "recall"]), SAMPLES)
    expected = {kind: fmean(scores[kind].fmeasure for scores in best) for kind in TYPES}
    expected |= {f"{kind}_precision": fmean(scores[kind].precision for scores in best) for kind in TYPES}
    expected |= {f"{kind}_recall": fmean(scores[kind].recall for scores in best) for kind in TYPES}
    assert metric.compute() == pytest.approx(expected, rel=1e-12)


def test_the_stemmer_and_the_lines_make_a_difference() -> None:
    plain, stemmed = update(Rouge(), SAMPLES).compute(), update(Rouge(use_stemmer=True), SAMPLES).compute()
    assert plain["rouge1"] < stemmed["rouge1"]
    assert plain["rougeL"] < plain["rougeLsum"]  # each line is matched on its own


def test_by_hand() -> None:
    """4 of 5 words are in the reference of 4, 2 of 4 pairs in its 3; in order 3 words."""
    metric = update(Rouge(), [("the cat sat down today", ["today the cat sat"])])
    expected = {"rouge1": 2 * 4 / 9, "rouge2": 2 * 2 / 7, "rougeL": 2 * 3 / 9, "rougeLsum": 2 * 3 / 9}
    assert metric.compute() == pytest.approx(expected, rel=1e-12)


def test_the_best_reference_counts_for_each_type_on_its_own() -> None:
    references = ["b a d c", "a b x y z"]  # all words in another order; two words in the right one
    metric = update(Rouge(), [("a b c d", references)])
    assert metric.compute()["rouge1"] == 1
    assert metric.compute()["rouge2"] == pytest.approx(2 * 1 / 7, rel=1e-12)


@pytest.mark.parametrize("prediction", ["", "!?", "\n\n", "übel"])
def test_answers_without_a_match_are_zero(prediction: str) -> None:
    numbers = update(Rouge(), [(prediction, ["the cat"])]).compute()
    assert set(numbers.values()) == {0}


def test_words_and_characters_of_other_scripts() -> None:
    assert WordTokenizer().tokenize("Über 3,5 cafe\u0301s, don't! नमस्ते") == [
        "über", "3", "5", "cafe\u0301s", "don", "t", "नमस्ते",
    ]  # fmt: skip
    assert CharacterTokenizer().tokenize("猫 坐, A") == ["猫", "坐", "a"]
    german = [("Über die Brücke", ["über jene Brücke"])]
    assert update(Rouge(tokenizer="words"), german).compute()["rouge1"] == pytest.approx(2 / 3, rel=1e-12)
    chinese = [("猫坐在垫子上。", ["猫在垫子上"])]
    assert update(Rouge(), chinese).compute()["rouge1"] == 0  # as published: none of it is a-z or 0-9
    assert update(Rouge(tokenizer="characters"), chinese).compute()["rouge1"] == pytest.approx(10 / 11, rel=1e-12)


def test_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> NoReturn:
        raise AssertionError("data of nltk, or the network, were asked for")

    for name in ("download", "sent_tokenize"):
        monkeypatch.setattr(nltk, name, refuse)
    monkeypatch.setattr(nltk.data, "load", refuse)
    monkeypatch.setattr(nltk.data, "find", refuse)
    monkeypatch.setattr(socket, "socket", refuse)
    for options in ({}, {"use_stemmer": True}, {"tokenizer": "words"}):
        assert update(Rouge(**options), SAMPLES).compute()["rougeLsum"] > 0
