"""Order, shares, packing and collation: which samples a step holds does not depend on how it is laid out."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from collie_core.config.data import DataConfig
from collie_core.data.dataset import SourceRange, TokenizedDataset, prepare_dataset
from collie_core.data.loader import (
    Batch,
    EpochOrder,
    Loader,
    StepBatch,
    check_packing,
    collate,
    eval_batches,
    pack,
    sample_order,
)
from collie_core.data.tokenizer import byte_tokenizer
from collie_core.errors import DataError, ModelError

MAX_LENGTH = 16
PAD = 999


def dataset(lengths: Sequence[int]) -> TokenizedDataset:
    """Samples whose tokens tell their number: sample i is i, i, i, ...; the first half of it is no target."""
    rows = [{"input_ids": [index] * length} for index, length in enumerate(lengths)]
    for row in rows:
        half = len(row["input_ids"]) // 2
        row["labels"] = [-100] * half + row["input_ids"][half:]
    data = DataConfig(max_length=MAX_LENGTH)
    return prepare_dataset(rows, data, byte_tokenizer(), vocab_size=64, name="train")


def loader(data: TokenizedDataset, **changes: Any) -> Loader:
    options: dict[str, Any] = {
        "samples_per_step": 4,
        "rows_per_micro_batch": 2,
        "max_length": MAX_LENGTH,
        "packing": False,
        "pad_token_id": PAD,
        "seed": 3,
        "total": data.samples_per_epoch,
    }
    return Loader(data, **options | changes)


def samples_of(step: StepBatch) -> Counter[int]:
    """How many tokens of each sample a step holds."""
    return sum((Counter(batch.input_ids[batch.input_ids != PAD].tolist()) for batch in step.micro_batches), Counter())


def targets_of(step: StepBatch) -> Counter[int]:
    return sum((Counter(batch.labels[batch.labels != -100].tolist()) for batch in step.micro_batches), Counter())


some_lengths = st.lists(st.integers(2, MAX_LENGTH), min_size=1, max_size=20)


# -- order --------------------------------------------------------------------------------------------------


@given(st.integers(1, 200), st.integers(0, 2**31 - 1), st.integers(0, 5))
def test_an_epoch_holds_every_sample_once(size: int, seed: int, epoch: int) -> None:
    assert sorted(sample_order(size, seed, epoch)) == list(range(size))


def test_the_order_is_the_same_for_ever() -> None:
    assert sample_order(10, 42, 0).tolist() == [7, 1, 6, 4, 3, 5, 9, 0, 2, 8]
    assert sample_order(10, 42, 1).tolist() == [4, 9, 5, 3, 0, 2, 7, 1, 6, 8]


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    orders = {tuple(sample_order(20, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


@settings(deadline=None, max_examples=30)
@given(some_lengths, st.integers(1, 7), st.integers(1, 3), st.booleans())
def test_epochs_join_without_a_gap(lengths: list[int], step: int, epochs: int, packing: bool) -> None:
    data = dataset(lengths)
    seen: Counter[int] = Counter()
    last = 0.0
    for batch in loader(data, samples_per_step=step, total=epochs * len(data), packing=packing):
        seen += samples_of(batch)
        last = batch.epoch
    assert seen == Counter({index: epochs * length for index, length in enumerate(lengths)})
    assert last == epochs


@settings(deadline=None, max_examples=30)
@given(some_lengths, st.integers(1, 5), st.integers(0, 6), st.booleans())
def test_a_run_resumes_at_any_position(lengths: list[int], step: int, skipped: int, packing: bool) -> None:
    data = dataset(lengths)
    options: dict[str, Any] = {"samples_per_step": step, "packing": packing, "total": None}
    whole = list(itertools.islice(loader(data, **options), skipped + 4))
    rest = list(itertools.islice(loader(data, start=skipped * step, **options), 4))
    assert_same_steps(whole[skipped:], rest)


def assert_same_steps(first: Sequence[StepBatch], second: Sequence[StepBatch]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert (one.samples, one.tokens, one.target_tokens, one.epoch) == (
            other.samples,
            other.tokens,
            other.target_tokens,
            other.epoch,
        )
        for left, right in zip(one.micro_batches, other.micro_batches, strict=True):
            torch.testing.assert_close(left.inputs(), right.inputs(), rtol=0, atol=0)
            torch.testing.assert_close(left.labels, right.labels, rtol=0, atol=0)


@settings(deadline=None, max_examples=40)
@given(some_lengths, st.integers(1, 9), st.integers(1, 4), st.booleans())
def test_any_number_of_ranks_shares_the_same_global_batches(
    lengths: list[int], step: int, size: int, packing: bool
) -> None:
    data = dataset(lengths)
    alone = list(loader(data, samples_per_step=step, packing=packing))
    shares = [list(loader(data, samples_per_step=step, packing=packing, rank=rank, size=size)) for rank in range(size)]
    for whole, *parts in zip(alone, *shares, strict=True):
        assert sum(map(samples_of, parts), Counter()) == samples_of(whole)
        assert sum(map(targets_of, parts), Counter()) == targets_of(whole)
        assert sum(part.target_tokens for part in parts) == whole.target_tokens
        assert sum(part.tokens for part in parts) == whole.tokens
        assert {part.samples for part in parts} == {whole.samples}
        assert len({len(part.micro_batches) for part in parts}) == 1  # so that sharded weights can be gathered


def test_ranks_that_pack_have_about_equally_many_tokens() -> None:
    data = dataset([12, 2, 11, 3, 10, 2, 12, 2])

    def tokens(**changes: Any) -> list[int]:
        options: dict[str, Any] = {"samples_per_step": 8, "rows_per_micro_batch": 4, "shuffle": False, "size": 2}
        return [next(iter(loader(data, rank=rank, **options | changes))).tokens for rank in (0, 1)]

    assert tokens() == [45, 9]
    assert tokens(packing=True) == [27, 27]


def test_even_shares_never_take_a_micro_batch_more() -> None:
    data = dataset([8, 12, 16, 10, 8])  # even ones are 16, 8 and 12, 10, 8, which takes three rows
    options: dict[str, Any] = {"samples_per_step": 5, "packing": True, "shuffle": False, "size": 2}
    for rank in (0, 1):
        assert len(next(iter(loader(data, rank=rank, **options))).micro_batches) == 1


def test_without_shuffling_the_samples_come_in_order() -> None:
    steps = loader(dataset([2] * 6), shuffle=False, samples_per_step=6)
    assert list(samples_of(next(iter(steps)))) == list(range(6))


def test_the_last_step_may_be_short() -> None:
    assert [step.samples for step in loader(dataset([3] * 10))] == [4, 4, 2]


def test_the_callers_random_state_stays() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    list(loader(dataset([3] * 10)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("packing", [False, True])
def test_workers_change_nothing(packing: bool) -> None:
    data = dataset([3, 9, 4, 16, 2, 5, 7, 7, 8, 2])
    alone = list(loader(data, packing=packing, total=25))
    assert_same_steps(list(loader(data, packing=packing, total=25, num_workers=1)), alone)


# -- weights ------------------------------------------------------------------------------------------------


def test_weights_repeat_and_thin_out_samples() -> None:
    order = EpochOrder([SourceRange(0, 10, 2.0), SourceRange(10, 20, 0.5), SourceRange(20, 30, 1.3)], seed=1)
    size = order.samples_per_epoch
    assert size == 20 + 5 + 13
    halves = set()
    for epoch in range(6):
        seen = Counter(order.indices(epoch * size, (epoch + 1) * size).tolist())
        assert all(seen[index] == 2 for index in range(10))
        assert sorted(seen[index] for index in range(20, 30)) == [1] * 7 + [2] * 3
        halves.add(tuple(index for index in range(10, 20) if seen[index]))
    assert all(len(half) == 5 for half in halves)
    assert len(halves) > 1  # another half each epoch


def test_a_weight_never_silences_a_source() -> None:
    assert EpochOrder([SourceRange(0, 2, 0.01), SourceRange(2, 4, 1.0)], seed=1).samples_per_epoch == 1 + 2


# -- layout -------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, MAX_LENGTH), max_size=60))
def test_packing_places_every_sample_once_in_rows_that_fit(lengths: list[int]) -> None:
    rows = pack(lengths, MAX_LENGTH)
    assert sorted(place for row in rows for place in row) == list(range(len(lengths)))
    filled = [sum(lengths[place] for place in row) for row in rows]
    first_fit: list[int] = []  # tokens of each row
    for length in sorted(lengths, reverse=True):
        row = next((row for row, held in enumerate(first_fit) if held + length <= MAX_LENGTH), len(first_fit))
        first_fit[row : row + 1] = [sum(first_fit[row : row + 1]) + length]
    assert len(filled) == len(first_fit)
    assert max(filled, default=0) <= max(first_fit, default=0)


def test_packed_rows_are_about_equally_long() -> None:
    assert pack([300, 260, 40, 30, 20], 512) == [[0, 3], [1, 2, 4]]  # first-fit: 390 and 260
    assert pack([3, 3, 4, 8, 10], 16) == [[4, 2], [3, 0, 1]]  # as first-fit lays them: the emptiest rows get 13 and 15
    assert pack([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert pack([6, 4, 4, 3, 3], 10) == [[0, 1], [2, 3, 4]]  # the emptiest rows would hold 9 and 11


@settings(deadline=None, max_examples=40)
@given(some_lengths, st.integers(1, 8), st.integers(1, 3))
def test_packed_and_padded_steps_hold_the_same_samples_and_targets(lengths: list[int], step: int, rows: int) -> None:
    data = dataset(lengths)
    options = {"samples_per_step": step, "rows_per_micro_batch": rows}
    for padded, packed in zip(loader(data, **options), loader(data, packing=True, **options), strict=True):
        assert samples_of(packed) == samples_of(padded)
        assert targets_of(packed) == targets_of(padded)
        assert len(packed.micro_batches) <= len(padded.micro_batches)
        assert all(max(batch.input_ids.shape) <= max(rows, MAX_LENGTH) for batch in packed.micro_batches)
        assert all(batch.input_ids.shape[0] <= rows for batch in packed.micro_batches + padded.micro_batches)


def test_a_packed_row_restarts_its_positions_and_closes_itself_against_the_padding() -> None:
    one = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    two = {"input_ids": [8, 9], "labels": [-100, 9]}
    batch = collate([[one, two], [two]], pad_token_id=0, packing=True)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9], [8, 9, 0, 0, 0]]
    assert batch.labels.tolist() == [[-100, 6, 7, -100, 9], [-100, 9, -100, -100, -100]]
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert {tensor.dtype for tensor in batch.inputs().values()} == {torch.int64}


def test_a_padded_batch_is_as_wide_as_its_longest_row_and_has_no_positions() -> None:
    step = next(iter(loader(dataset([2, 5, 3, 9]), rows_per_micro_batch=4)))
    (batch,) = step.micro_batches
    assert batch.input_ids.shape == (4, 9)
    assert set(batch.inputs()) == {"input_ids"}
    assert step.tokens == 19


def test_padding_is_no_target_even_with_the_id_of_a_real_one() -> None:
    sample = {"input_ids": [5, 2], "labels": [-100, 2]}
    batch = collate([[sample], [{"input_ids": [5, 5, 2], "labels": [-100, 5, 2]}]], pad_token_id=2, packing=False)
    assert batch.target_tokens == 3


def test_a_batch_moves_with_all_its_tensors() -> None:
    batch = Batch(*(torch.zeros(1, 2, dtype=torch.int64) for _ in range(3)))
    moved = batch.to("meta")
    assert {tensor.device.type for tensor in (*moved.inputs().values(), moved.labels)} == {"meta"}
    assert batch.input_ids.device.type == "cpu"


def test_a_sample_too_long_for_a_row_is_refused() -> None:
    with pytest.raises(DataError, match="9 tokens does not fit max_length=8"):
        list(loader(dataset([2, 9]), max_length=8))


# -- evaluation ---------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(some_lengths, st.integers(1, 6), st.integers(1, 4))
def test_evaluation_sees_each_sample_once_over_all_ranks(lengths: list[int], batch_size: int, size: int) -> None:
    data = dataset(lengths)
    options = {"batch_size": batch_size, "pad_token_id": PAD}
    ranks = [list(eval_batches(data, rank=rank, size=size, **options)) for rank in range(size)]
    step = StepBatch([batch for rank in ranks for batch in rank], 0, 0, 0.0)
    assert samples_of(step) == Counter(dict(enumerate(lengths)))
    assert len(set(map(len, ranks))) == 1


# -- packing and the model ----------------------------------------------------------------------------------


def model(family: str, **options: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=None,
    )
    implementation = options.pop("attention", "sdpa")
    config.update(options)
    config._attn_implementation = implementation
    return AutoModelForCausalLM.from_config(config)


FAMILIES = [("llama", {}), ("mistral", {"sliding_window": 3}), ("qwen2", {})]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "options"), FAMILIES)
def test_families_that_keep_samples_apart_may_pack(family: str, options: dict[str, Any], attention: str) -> None:
    network = model(family, attention=attention, **options).train()
    check_packing(network)
    assert network.training


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "options"), FAMILIES)
def test_a_packed_sample_is_as_if_alone(family: str, options: dict[str, Any], attention: str) -> None:
    network = model(family, attention=attention, **options).eval()
    data = dataset([5, 9, 2, 16, 7, 3, 4])
    options = {"samples_per_step": 7, "rows_per_micro_batch": 9, "pad_token_id": 63}
    (packed,) = next(iter(loader(data, packing=True, **options))).micro_batches
    assert packed.input_ids.shape[0] > 1
    assert packed.position_ids is not None
    with torch.no_grad():
        together = network(**packed.inputs(), use_cache=False).logits
        for row, column in (packed.position_ids == 0).nonzero().tolist():
            number = int(packed.input_ids[row, column])
            if number == 63:
                continue
            ids = torch.from_numpy(data[number]["input_ids"]).long()
            alone = network(input_ids=ids[None], use_cache=False).logits[0]
            torch.testing.assert_close(together[row, column : column + len(ids)], alone, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["bloom", "falcon"])
def test_a_family_that_lets_samples_see_each_other_is_refused(family: str) -> None:
    with pytest.raises(ModelError, match=rf"the {family} model does not keep packed samples apart.*packing=false"):
        check_packing(model(family, attention="eager"))
