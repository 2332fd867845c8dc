"""Traces of a few layers stand for those of many."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from collie_core.config.run import RunConfig
from collie_core.data.tokenizer import build_tokenizer
from collie_core.plan.children import each_in_child
from collie_core.plan.extend import Trace, alike, extended
from collie_core.plan.layers import Layers, layers_of
from collie_core.plan.plan import make_plan, passes_at_least
from collie_core.plan.predict import RankTrace, predict_rank, trace_rank
from collie_core.plan.trace import COMPONENTS, Section
from collie_core.plan.work import extended_work

MANY = 8
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": MANY,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def run(**changes: Any) -> RunConfig:
    sections: dict[str, Any] = {
        "model": {"config": LLAMA},
        "tokenizer": "byte",
        "data": {"train": "unread.jsonl", "max_length": 64},
        "train": {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    }
    return RunConfig(**sections | changes)


def section(*steps: tuple[str, int]) -> Section:
    """In which each operation holds so many bytes of activations."""
    held = np.zeros((len(steps), len(COMPONENTS)), np.int64)
    held[:, COMPONENTS.index("activations")] = [nbytes for _, nbytes in steps]
    return Section("forward", tuple((name, frozenset()) for name, _ in steps), {"device": held, "host": 2 * held})


def forward(layers: int) -> Section:
    """Layers that keep 10 bytes each, and a head that holds more than one of them, once."""
    kept = [(name, 10 * number + more) for number in range(layers) for name, more in (("mix", 5), ("add", 10))]
    return section(("embed", 1), *kept, ("head", 10 * layers + 100))


def test_what_grows_with_the_layers_grows_on() -> None:
    peaks = extended(Trace(2, [forward(2)]), Trace(3, [forward(3)]), 40)
    assert peaks["forward"].total == 500
    assert extended(Trace(2, [forward(2)]), Trace(3, [forward(3)]), 40, "host")["forward"].total == 1000


def test_the_operation_of_the_peak_may_be_another_one_in_a_deep_model() -> None:
    def section_of(layers: int) -> Section:
        return section(("first", 1000 + layers), *[("layer", 1)] * layers, ("last", 100 * layers))

    peaks = extended(Trace(2, [section_of(2)]), Trace(3, [section_of(3)]), 40)
    assert peaks["forward"].total == 4000


def test_other_phases_are_no_extension() -> None:
    assert alike([forward(2)], [forward(3)])
    assert not alike([forward(2)], [forward(3)] * 2)


@pytest.mark.parametrize(
    ("changes", "processes"),
    [
        ({}, 1),
        (
            {
                "model": {"config": LLAMA, "gradient_checkpointing": "full"},
                "optimizer": {"type": "sgd", "lr": 0.1, "momentum": 0.9},
                "parallel": {"tensor_parallel_size": 2},
            },
            2,
        ),
        ({"parallel": {"pipeline_parallel_size": 2}}, 2),
        ({"parallel": {"zero_stage": 3}}, 2),
    ],
    ids=["plain", "momentum-checkpointing-tp2", "pp2", "zero3"],
)
@pytest.mark.filterwarnings("ignore")  # DeepSpeed calls collectives that torch deprecates
def test_few_layers_say_what_many_hold_and_do(changes: dict[str, Any], processes: int) -> None:
    config = run(**changes)
    layers = layers_of(config, build_tokenizer(config.tokenizer, config.model))
    assert layers is not None
    assert sum(layers.of_stage) == MANY
    each = layers.of_stage[0]
    low, high, whole = each_in_child(traced, [(config, processes, depth) for depth in (2, 3, None)])
    assert isinstance(whole, RankTrace)
    found = extended(Trace(2, low.sections), Trace(3, high.sections), each, bounded=config.parallel.zero_stage == 3)
    for phase, peak in found.items():
        most = max(int(part.held["device"].sum(1).max()) for part in whole.sections if part.phase == phase)
        assert peak.total == pytest.approx(most, rel=0.005)
    work = extended_work(low.steps[1], high.steps[1], each - 2)
    assert work.flops == whole.steps[1].flops > 0
    for ranks, nbytes in whole.steps[1].sent.items():
        assert work.sent[ranks] == pytest.approx(nbytes, rel=0.02)


def traced(config: RunConfig, processes: int, depth: int | None) -> RankTrace:
    return trace_rank(config, 0, processes, depth, gpu=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("parallel", [{}, {"tensor_parallel_size": 2}], ids=["dp1", "tp2"])
def test_a_plan_of_many_layers_is_that_of_the_whole_model(parallel: dict[str, Any]) -> None:
    config, processes = run(parallel=parallel), parallel.get("tensor_parallel_size", 1)
    read = make_plan(config, processes, gpu=True).largest.prediction
    (whole,) = each_in_child(whole_rank, [(config, processes)])
    assert read.layers == (2, 3)
    assert {phase: peak.total for phase, peak in read.peaks["device"].items()} == whole


@pytest.mark.filterwarnings("ignore")
def test_passes_alone_are_read_from_few_layers_where_the_update_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("collie_core.plan.layers.LIVE", 1000)  # so that few layers hold all that is gathered
    zero = {"reduce_bucket_size": 1000, "stage3_prefetch_bucket_size": 1000, "sub_group_size": 5000}
    config = run(parallel={"zero_stage": 3}, deepspeed={"zero_optimization": zero})
    least = passes_at_least(config, 2, gpu=True)
    assert least is not None
    whole = make_plan(config, 2, gpu=True)
    assert whole.largest.prediction.layers is None
    for phase, peak in least.largest.prediction.peaks["device"].items():
        assert peak.total == pytest.approx(whole.largest.prediction.peaks["device"][phase].total, rel=0.005)
    assert passes_at_least(run(), 1, gpu=True) is None  # a plan says more, and takes as long


def whole_rank(config: RunConfig, processes: int) -> dict[str, int]:
    found = predict_rank(config, 0, processes, gpu=True)
    return {phase: peak.total for phase, peak in found.peaks["device"].items()}


def test_buckets_of_gradients_say_how_many_layers_stand_for_all() -> None:
    def depths(parameters: int, **parallel: Any) -> tuple[int, int] | None:
        return Layers((40,), parameters, 0).depths(run(parallel=parallel), 8)

    assert depths(200_000_000) == (2, 3)
    assert depths(200_000_000, zero_stage=3) == (9, 10)  # 1.5e9 gathered or in the bucket
    assert depths(50_000_000, zero_stage=3) is None  # 32 of 40: as well all
    assert depths(300_000_000, zero_stage=3) is None  # 1.5e9 on each rank are two groups of the optimizer
    assert depths(200_000_000, zero_stage=1) == (4, 9)  # five layers fill two buckets
    assert depths(250_000_000, zero_stage=2) == (3, 5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("zero", [0, 3])
def test_a_trace_does_not_depend_on_those_before_it_in_its_process(zero: int) -> None:
    config = run(parallel={"zero_stage": zero})
    first, again = each_in_child(two_traces, [(config,)])[0]
    assert first == again


def two_traces(config: RunConfig) -> list[list[tuple[str, int]]]:
    """Phases and peaks, twice."""
    traces = [traced(config, 2 if config.parallel.zero_stage else 1, 2) for _ in range(2)]
    return [[(part.phase, int(part.held["device"].sum(1).max())) for part in trace.sections] for trace in traces]


def test_layers_that_differ_do_not_stand_for_each_other() -> None:
    qwen = {**LLAMA, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 4}
    config = run(model={"config": qwen})
    assert layers_of(config, build_tokenizer(config.tokenizer, config.model)) is None
