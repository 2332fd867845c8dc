"""Windows over long texts, and what is said of the target tokens."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from collie_core.errors import RunError
from collie_core.evaluate.context import EvaluationContext, Reading, require_new_names
from collie_core.evaluate.perplexity import Perplexity, windows
from collie_core.evaluate.predictions import Predictions
from collie_core.evaluate.scoring import highest, target_scores, targets_per_row
from collie_core.generate import SampleText
from collie_core.topology import Axis, Topology


@given(st.integers(1, 60), st.integers(2, 20), st.data())
def test_each_token_counts_in_one_window_with_enough_before_it(length: int, size: int, data: Any) -> None:
    stride = data.draw(st.integers(1, size - 1))
    found = [*windows(0, length, size, stride)]
    assert [place for part in found for place in range(part.score, part.stop)] == [*range(length)]
    for part in found:
        assert part.stop - part.begin <= size
        if part.begin:
            assert part.score - part.begin == size - stride
    assert found[-1].stop == length


def test_scores_of_targets_row_after_row() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 4, 9), torch.tensor([[-100, 3, -100, 5], [7, -100, -100, 1]])
    scores = target_scores(logits, labels, expected=True)
    assert scores.ids.tolist() == [3, 5, 1]
    wanted = torch.stack([logits[0, 0], logits[0, 2], logits[1, 2]])
    torch.testing.assert_close(scores.losses, F.cross_entropy(wanted, scores.ids, reduction="none"))
    assert scores.expected is not None
    assert scores.expected.tolist() == wanted.argmax(-1).tolist()
    assert targets_per_row(labels) == [2, 1]


def test_the_first_of_equal_logits_is_expected() -> None:
    assert highest(torch.tensor([[1.0, 5.0, 5.0], [2.0, 2.0, 2.0]]), None).tolist() == [1, 0]


ALONE = Axis()


def context_of(dp: Axis = ALONE, batch_size: int = 2, readings: Any = ()) -> EvaluationContext:
    nothing: Any = None
    topology = Topology(dp=dp)
    return EvaluationContext(
        "it", nothing, nothing, topology, nothing, batch_size, 0, readings, nothing, nothing, nothing, nothing
    )


@given(st.integers(0, 30), st.integers(1, 4), st.integers(1, 5))
def test_samples_are_dealt_out_once_in_as_many_turns_and_the_same_batches(count: int, size: int, batch: int) -> None:
    ranks = [[*context_of(Axis(size, rank), batch).deal(range(count))] for rank in range(size)]
    assert len({len(turns) for turns in ranks}) == 1
    batches = {number: share for turns in ranks for number, share in turns if share}
    alone = dict(context_of(Axis(), batch).deal(range(count)))
    assert dict(sorted(batches.items())) == alone
    assert [item for share in alone.values() for item in share] == [*range(count)]


def test_metrics_get_what_they_read_and_results_have_one_name_each() -> None:
    losses = Perplexity()
    context = context_of(readings=[Reading("token_losses", losses), Reading("texts", SimpleNamespace())])
    context.feed("token_losses", torch.tensor([1.0, 3.0]), torch.tensor([4, 5]))
    context.feed("token_losses", torch.empty(0), torch.empty(0))
    context.feed("choices", ["a"], ["b"])
    assert losses.compute() == {"loss": 2.0, "perplexity": math.exp(2.0)}
    assert context.wants("texts")
    assert not context.wants("token_ids")
    context.readings = [Reading("token_losses", losses)] * 2
    with pytest.raises(RunError, match="loss, perplexity is given twice"):
        context.outcome()
    require_new_names("it", {"other": 1.0}, losses.compute())


def test_a_file_of_predictions_is_there_whole_or_not_at_all(tmp_path: Any) -> None:
    predictions = Predictions(tmp_path / "a" / "it.jsonl", 1, Topology())
    texts = [SampleText("p", "t", word) for word in "xy"]
    with predictions.written():
        predictions.add([{"index": 0, "prediction": "ü\n"}], texts)
        assert not predictions.path.exists()
    assert predictions.path.read_text("utf-8") == '{"index": 0, "prediction": "ü\\n"}\n'
    assert predictions.shown == texts[:1]
    again = Predictions(tmp_path / "a" / "other.jsonl", 0, Topology())

    def fail() -> None:
        with again.written():
            again.add([{"index": 0}], [])
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["it.jsonl"]
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        Predictions(tmp_path / "file" / "it.jsonl", 0, Topology()).add([{}], [])
