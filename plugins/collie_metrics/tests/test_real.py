"""Real texts: the numbers are those of the libraries, and those of one rank are those of four."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from samples import Sample, on_ranks, outcome, update

from collie_metrics.bleu import Bleu
from collie_metrics.chrf import Chrf
from collie_metrics.f1 import F1
from collie_metrics.numeric_match import NumericMatch
from collie_metrics.rouge import Rouge

REAL = Path(__file__).resolve().parents[4] / "shared" / "data" / "text"
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not REAL.is_dir(), reason="the real texts do not lie beside this checkout"),
]


def rows_of(name: str, count: int) -> list[dict[str, Any]]:
    with (REAL / f"{name}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for _, line in zip(range(count), lines, strict=False)]


@pytest.fixture(scope="module")
def translations() -> list[Sample]:
    """Translations of a system that forgets every fifth word and swaps two now and then; one answer is empty."""
    samples: list[Sample] = []
    for place, row in enumerate(rows_of("multi30k_ende", 400)):
        words = row["output"].split()
        kept = [word for index, word in enumerate(words) if (place + index) % 5]
        if place % 3 == 0:
            kept[:2] = kept[1::-1]
        samples.append((" ".join(kept) if place else "", [row["output"]]))
    return samples


@pytest.mark.parametrize(
    ("make", "scorer"),
    [
        (Bleu, sacrebleu.BLEU()),
        (lambda: Bleu(tokenize="intl", lowercase=True), sacrebleu.BLEU(tokenize="intl", lowercase=True)),
        (Chrf, sacrebleu.CHRF()),
        (lambda: Chrf(word_order=2), sacrebleu.CHRF(word_order=2)),
    ],
)
def test_translations_score_as_by_sacrebleu_on_any_ranks(translations: list[Sample], make: Any, scorer: Any) -> None:
    predictions, references = zip(*translations, strict=True)
    expected = scorer.corpus_score(predictions, [[texts[0] for texts in references]]).score
    whole = update(make(), translations)
    assert list(whole.compute().values()) == [expected]
    assert 20 < expected < 90
    for world_size in (2, 4):
        shares = [translations[rank::world_size] for rank in range(world_size)]
        assert outcome(on_ranks(make, [[share[:7], share[7:]] for share in shares])) == outcome(whole)


def test_translations_score_as_by_rouge_score_on_any_ranks(translations: list[Sample]) -> None:
    kinds = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorer = RougeScorer(kinds)
    scores = [scorer.score(references[0], prediction) for prediction, references in translations]
    expected = {kind: sum(score[kind].fmeasure for score in scores) / len(scores) for kind in kinds}
    whole = update(Rouge(), translations)
    assert whole.compute() == pytest.approx(expected, rel=1e-12)
    shares = [[translations[rank::4]] for rank in range(4)]
    assert outcome(on_ranks(Rouge, shares)) == outcome(whole)


def test_every_answer_of_gsm8k_is_read() -> None:
    rows = rows_of("gsm8k_train_2000", 2000)
    answers = [row["output"] for row in rows]
    written = [answer.rpartition("#### ")[2].strip().replace(",", "") for answer in answers]
    samples: list[Sample] = [(answer, [number]) for answer, number in zip(answers, written, strict=True)]
    assert update(NumericMatch(), samples).compute() == {"numeric_match": 1, "numeric_match_answered": 1}
    shifted: list[Sample] = [(answer, [f"#### {number}1"]) for answer, number in zip(answers, written, strict=True)]
    zeros = sum(float(number) == 0 for number in written)
    assert update(NumericMatch(), shifted).compute()["numeric_match"] <= zeros / len(rows)


def test_classes_of_reviews_are_counted_as_by_sklearn() -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not there to compare with")
    rows = rows_of("rt_polarity_cls_8000", 2000)
    targets = [row["target"] for row in rows]  # 0 and 1
    predictions = [len(row["input"]) % 3 for row in rows]  # 2 is no class
    numbers = update(F1(average=["macro"]), list(zip(predictions, targets, strict=True))).compute()
    expected = metrics.precision_recall_fscore_support(targets, predictions, average="macro", zero_division=0)[:3]
    assert tuple(numbers.values()) == pytest.approx(expected, rel=1e-12)
