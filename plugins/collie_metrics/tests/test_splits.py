"""A metric over a set is one number, however the set is cut into batches and ranks."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import Sample, on_ranks, outcome, samples_of, update

from collie_metrics.accuracy import Accuracy
from collie_metrics.bleu import Bleu
from collie_metrics.chrf import Chrf
from collie_metrics.decode import Decode
from collie_metrics.exact_match import ExactMatch
from collie_metrics.f1 import F1
from collie_metrics.numeric_match import NumericMatch
from collie_metrics.rouge import Rouge
from collie_metrics.token_accuracy import TokenAccuracy

# Few words and letters, so that there is something to match; letters with and without accents, in both encodings.
words = st.sampled_from(
    ["the", "cat", "sat.", "Über", "u\u0308ber", "überü", "12", "3.50", "-7", "####", "猫", "\n", "a-b", "  "]
)
texts = st.lists(words, max_size=8).map(" ".join) | st.text(max_size=12)
with_references = st.tuples(texts, st.lists(texts, min_size=1, max_size=3))
with_numbers = st.tuples(texts, st.lists(st.integers(-99, 9999).map("#### {:,}".format), min_size=1, max_size=2))
choices = st.sampled_from(["a", "b", "c", "", 0, 1, 7])
with_choices = st.tuples(choices, choices)


class Tokens(TokenAccuracy):
    """Fed with lists."""

    def update(self, predictions: Any, targets: Any) -> None:
        super().update(torch.tensor(predictions, dtype=torch.long), torch.tensor(targets, dtype=torch.long))


@dataclass(frozen=True)
class Case:
    """A metric, samples for it, and one that it can take."""

    make: Callable[[], Any]
    samples: st.SearchStrategy[Any]
    one: Sample

    @property
    def reads_texts(self) -> bool:
        return isinstance(self.one[1], list)


TEXT, CHOICE = ("a", ["#### 1", "a"]), ("a", "b")
CASES = {
    "accuracy": Case(Accuracy, with_choices, CHOICE),
    "bleu": Case(Bleu, with_references, TEXT),
    "bleu of characters": Case(
        lambda: Bleu(tokenize="char", smooth_method="add-k", smooth_value=0.5, max_ngram_order=3, lowercase=True),
        with_references,
        TEXT,
    ),
    "chrf": Case(Chrf, with_references, TEXT),
    "chrf++": Case(lambda: Chrf(word_order=2, whitespace=True, eps_smoothing=True), with_references, TEXT),
    "decode": Case(lambda: Decode(rows=3), with_references, TEXT),
    "decode of classes": Case(
        lambda: Decode(rows=3), with_choices.map(lambda pair: (str(pair[0]), [str(pair[1])])), TEXT
    ),
    "exact match": Case(lambda: ExactMatch(ignore_case=True, unicode_form="NFC"), with_references, TEXT),
    "f1": Case(lambda: F1(positive="a"), with_choices, CHOICE),
    "f1 of labels": Case(lambda: F1(labels=["a", "b", "c", "", 0, 1, 7, "never"]), with_choices, CHOICE),
    "numeric match": Case(lambda: NumericMatch(tolerance=0.1), with_numbers, TEXT),
    "rouge": Case(lambda: Rouge(scores=["f1", "precision", "recall"]), with_references, TEXT),
    "rouge of words": Case(lambda: Rouge(tokenizer="words"), with_references, TEXT),
    "token accuracy": Case(Tokens, st.tuples(st.integers(0, 5), st.integers(0, 5)), (3, 4)),
}
every = pytest.mark.parametrize("name", CASES)


def batches(data: st.DataObject, samples: Sequence[Sample]) -> list[Sequence[Sample]]:
    """The samples in batches of any size, empty ones too."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(samples)), max_size=4)))
    return [samples[start:end] for start, end in zip([0, *cuts], [*cuts, len(samples)], strict=True)]


@every
@given(data=st.data())
@settings(max_examples=30)
def test_any_split_gives_the_same_to_the_bit(name: str, data: st.DataObject) -> None:
    make, strategy = CASES[name].make, CASES[name].samples
    samples = data.draw(st.lists(strategy, max_size=14))
    whole = outcome(update(make(), samples))
    world_size = data.draw(st.sampled_from([1, 2, 4]))
    shares = [samples[rank::world_size] for rank in range(world_size)]  # uneven: the last ranks have one less, or none
    assert outcome(on_ranks(make, [batches(data, share) for share in shares])) == whole
    others = batches(data, data.draw(st.permutations(samples)))
    assert outcome(on_ranks(make, [[part] for part in others])) == whole


@every
@given(data=st.data())
@settings(max_examples=15)
def test_merge_is_associative_and_commutative(name: str, data: st.DataObject) -> None:
    make, strategy = CASES[name].make, CASES[name].samples
    parts = [data.draw(st.lists(strategy, max_size=5)) for _ in range(3)]

    def metric(index: int) -> Any:
        return update(make(), parts[index])

    def merged(first: Any, second: Any) -> Any:
        first.merge(second)
        return first

    left = outcome(merged(merged(metric(0), metric(1)), metric(2)))
    assert outcome(merged(metric(0), merged(metric(1), metric(2)))) == left
    assert outcome(merged(metric(2), merged(metric(1), metric(0)))) == left
    assert outcome(merged(merged(make(), metric(0)), make())) == outcome(metric(0))  # without samples: neutral


@every
def test_without_samples_every_number_is_nan_and_has_its_name(name: str) -> None:
    case = CASES[name]
    names = update(case.make(), [case.one]).compute().keys()
    empty = case.make()
    for _ in range(2):
        assert empty.compute().keys() == names
        assert all(map(math.isnan, empty.compute().values()))
        assert getattr(empty, "details", dict)() == {}
        update(empty, [])
        empty.merge(case.make())


@every
def test_lengths_that_differ_are_an_error_and_change_nothing(name: str) -> None:
    case = CASES[name]
    metric = case.make()
    before = pickle.dumps(metric)
    prediction, target = case.one
    with pytest.raises(ValueError, match=r"give one .*for every") as caught:
        metric.update([prediction, prediction], [target])
    assert "\n" not in str(caught.value)
    assert pickle.dumps(metric) == before


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.reads_texts])
def test_a_sample_needs_a_list_of_references(name: str) -> None:
    metric = CASES[name].make()
    with pytest.raises(ValueError, match=r"targets\[0\]='12' is one text: give a list of references"):
        metric.update(["12"], ["12"])
    with pytest.raises(ValueError, match=r"targets\[1\] is empty: give at least one reference for every sample"):
        metric.update(["12", "1"], [["12"], []])
    assert all(map(math.isnan, metric.compute().values()))


@pytest.mark.parametrize("make", [Bleu, Chrf, Rouge, ExactMatch, NumericMatch])
def test_what_is_sent_between_ranks_does_not_grow(make: Callable[[], Any]) -> None:
    samples = [(text, [f"{reference} 5" for reference in references]) for text, references in samples_of("summaries")]
    once = len(pickle.dumps(update(make(), samples)))
    often = update(make(), samples * 50)
    assert len(pickle.dumps(often)) < once + 200  # longer integers
    assert once < 1500
