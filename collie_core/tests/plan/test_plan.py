"""Plans: which ranks are alike, what is refused, and how it reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from collie_core.cli import main
from collie_core.config.run import RunConfig
from collie_core.errors import RunError
from collie_core.plan.children import each_in_child
from collie_core.plan.plan import Place, Shape, _alike, make_plan
from collie_core.plan.predict import RankPrediction, predict_rank
from collie_core.plan.rehearse import RehearsedParts
from collie_core.plan.show import bytes_text, parse_bytes, remedy_text
from collie_core.plan.trace import Peak

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def sections(**changes: Any) -> dict[str, Any]:
    return {
        "model": {"config": LLAMA},
        "tokenizer": "byte",
        "data": {"train": "unread.jsonl", "max_length": 32},
        "train": {"max_steps": 3},
    } | changes


def prediction(nbytes: int, twins: tuple[int, ...] = (0,)) -> RankPrediction:
    peaks = {"forward": Peak({"weights": nbytes}, "forward")}
    return RankPrediction({"device": peaks, "host": peaks}, twins)


def test_amounts_of_memory_are_read_and_written() -> None:
    assert parse_bytes("80GiB") == 80 * 2**30
    assert parse_bytes(" 24 gb ") == 24 * 10**9
    assert bytes_text(1536 * 2**20) == "1.50 GiB"
    assert bytes_text(12) == "12 B"
    for wrong in ("80", "GiB", "-1GiB", "0GiB", "eighty"):
        with pytest.raises(RunError, match="80GiB"):
            parse_bytes(wrong)


def test_a_shape_has_the_sizes_of_the_run() -> None:
    config = RunConfig(**sections(parallel={"tensor_parallel_size": 2}))
    shape = Shape.of(config, 6)
    assert shape == Shape(tp=2, pp=1, dp=3)
    assert shape.rank(Place(stage=0, dp=2, tp=1)) == 5
    with pytest.raises(RunError, match="plan for 2 or a multiple of it"):
        Shape.of(config, 3)


def test_copies_that_were_not_predicted_are_like_the_largest() -> None:
    shape = Shape(tp=1, pp=1, dp=4)
    found = {Place(0, 0, 0): prediction(1), Place(0, 3, 0): prediction(2)}
    assert [place.dp for place in _alike(Place(0, 0, 0), found, shape)] == [0]
    assert [place.dp for place in _alike(Place(0, 3, 0), found, shape)] == [1, 2, 3]


def test_tensor_parallel_ranks_with_equal_shapes_are_alike() -> None:
    shape = Shape(tp=3, pp=1, dp=2)
    twins = (0, 0, 2)
    found = {Place(0, 0, 0): prediction(2, twins), Place(0, 0, 2): prediction(1, twins)}
    assert len(list(_alike(Place(0, 0, 0), found, shape))) == 4
    assert {place.tp for place in _alike(Place(0, 0, 2), found, shape)} == {2}


def echo(value: int) -> int:
    if value < 0:
        raise RunError("no")
    return value


def test_children_answer_in_order_and_tell_their_errors() -> None:
    assert each_in_child(echo, [(3,), (1,), (2,)]) == [3, 1, 2]
    with pytest.raises(RunError, match="no"):
        each_in_child(echo, [(1,), (-1,)])


@pytest.mark.filterwarnings("ignore")  # DeepSpeed calls collectives that torch deprecates
@pytest.mark.parametrize(
    ("offload", "on_device", "on_host"),
    [
        ({"zero_stage": 2, "offload_optimizer": True}, {"weights"}, {"gradients", "optimizer state"}),
        ({"zero_stage": 3, "offload_param": True}, {"optimizer state", "gradients"}, {"weights"}),
        (
            {"zero_stage": 3, "offload_optimizer": True, "offload_param": True},
            set(),
            {"weights", "gradients", "optimizer state"},
        ),
    ],
    ids=["optimizer", "parameters", "both"],
)
def test_what_is_offloaded_lies_in_host_memory(offload: dict[str, Any], on_device: set[str], on_host: set[str]) -> None:
    settings = {"parallel": offload, "model": {"config": LLAMA, "dtype": "bfloat16"}}
    config = RunConfig(**sections(**settings))
    without = RunConfig(**sections(**settings | {"parallel": {"zero_stage": offload["zero_stage"]}}))
    plan, all_there = (make_plan(one, 2, gpu=True) for one in (config, without))
    assert plan.offloads
    assert not all_there.offloads
    assert plan.largest.predicted < all_there.largest.predicted
    held, lent = (peaks["update"].components for peaks in plan.largest.prediction.peaks.values())
    kept = all_there.largest.prediction.peaks["device"]["update"].components
    share = kept["weights"] // (2 if offload["zero_stage"] == 2 else 1)  # of the model, in two bytes a parameter
    for name in ("weights", "gradients", "optimizer state"):
        # Parameters with fewer than 100,000 entries stand whole on the device while a step goes on.
        assert (held[name] > share / 2) == (name in on_device) or (name, offload["zero_stage"]) == ("weights", 3)
        assert (lent[name] >= share / 2) == (name in on_host)
    if "optimizer state" in on_host:  # a copy of the weights and two moments, in float32
        assert lent["optimizer state"] == pytest.approx(6 * share, rel=0.05)
    beside = make_plan(config, 2, gpu=False)
    assert not beside.offloads
    assert beside.largest.predicted > plan.largest.predicted
    assert set(beside.host.values()) == {0}


def planned_on_gpu(changes: dict[str, Any], rank: int) -> int:
    return predict_rank(RunConfig(**sections(**changes)), rank, 4, gpu=True).peak.total


def test_no_step_mixes_tensors_of_the_device_and_of_the_host() -> None:
    accumulated = {"max_steps": 3, "gradient_accumulation_steps": 2}
    half = {"config": LLAMA, "dtype": "float16", "gradient_checkpointing": "full"}
    runs: list[dict[str, Any]] = [
        {"parallel": {"pipeline_parallel_size": 2}, "train": accumulated, "model": half},
        {"parallel": {"tensor_parallel_size": 2, "sequence_parallel": True}, "train": accumulated},
        {
            "optimizer": {"type": "sgd", "lr": 0.1, "momentum": 0.9},
            "data": {"train": "unread.jsonl", "max_length": 32, "packing": True},
        },
    ]
    assert all(each_in_child(planned_on_gpu, [(changes, rank) for changes in runs for rank in (0, 3)]))


def test_the_command_needs_no_weights_and_no_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(sections()))
    arguments = ["--gpus", "4", "--gpu-memory", "1MiB", "--json", "parallel.tensor_parallel_size=2"]
    assert main(["plan", str(path), *arguments]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["data_parallel_size"] == plan["tensor_parallel_size"] == 2
    assert plan["dtype"] == "bfloat16"
    assert plan["fits"] is True
    assert [rank["rank"] for rank in plan["ranks"]] == [0, 1, 2, 3]
    assert plan["predicted_peak_bytes"] == sum(rank["predicted_peak_bytes"] for rank in plan["ranks"])
    for rank in plan["ranks"]:
        assert rank["predicted_peak_bytes"] == sum(rank["components"].values()) == max(rank["phases"].values())
    assert main(["plan", str(path), "--gpu-memory", "1GiB"]) == 0
    text = capsys.readouterr().out
    assert "optimizer state" in text
    assert "fits: rank 0 would leave" in text


def test_mistakes_are_told_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(sections()))
    for arguments, said in (
        (["--gpus", "0"], "--gpus 0: must be at least 1"),
        (["--gpu-memory", "lots"], "'lots' is no amount of memory"),
        (["--gpus", "1", "--measure"], "has no GPU"),
        (["--nproc", "3", "parallel.tensor_parallel_size=2"], "plan for 2 or a multiple"),
        (["--gpus", "3", "--nodes", "2"], "--nodes 2: 3 GPUs cannot stand in so many machines alike"),
        (["--host-memory", "1GiB"], "--host-memory needs --gpu-memory"),
    ):
        assert main(["plan", str(path), *arguments]) == 1
        assert said in capsys.readouterr().err


def test_what_would_make_it_fit_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(sections(train={"max_steps": 3, "per_device_train_batch_size": 8})))

    def plan(memory: str, *overrides: str) -> Any:
        code = main(["plan", str(path), "--gpu-memory", memory, "--json", *overrides])
        return code, json.loads(capsys.readouterr().out)

    code, found = plan("1MiB")
    assert (code, found["fits"]) == (1, False)
    assert found["would_fit_with"][0] == "model.gradient_checkpointing=full"
    code, after = plan("1MiB", *found["would_fit_with"])
    assert (code, after["fits"]) == (0, True)
    assert after["batch"].startswith("8 samples per step")
    code, found = plan("1KiB")
    assert (code, found["would_fit_with"]) == (1, None)
    assert "plan for more" in remedy_text(None, 1)


@pytest.mark.filterwarnings("ignore")
def test_what_is_offloaded_must_fit_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    llama = LLAMA | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    small = {"reduce_bucket_size": 1000}
    settings = {"model": {"config": llama}, "parallel": {"zero_stage": 2}, "deepspeed": {"zero_optimization": small}}
    path.write_text(json.dumps(sections(**settings)))
    assert main(["plan", str(path), "--gpu-memory", "5MiB", "--gpus", "1", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["would_fit_with"]
    assert found[-1] == "parallel.offload_optimizer=true"
    assert main(["plan", str(path), "--gpu-memory", "5MiB", "--gpus", "1", *found]) == 0
    said = capsys.readouterr().out
    assert "in host memory" in said
    assert "fits: rank 0 would leave" in said
    assert main(["plan", str(path), "--gpu-memory", "5MiB", "--gpus", "1", "--host-memory", "1MiB", *found]) == 1
    assert "does NOT fit: a machine's ranks would need" in capsys.readouterr().out


@pytest.mark.parametrize("stages", [1, 2])
def test_further_micro_batches_hold_what_the_first_ones_hold(stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig(
        **sections(
            parallel={"pipeline_parallel_size": stages}, train={"max_steps": 3, "gradient_accumulation_steps": 5}
        )
    )
    planned = make_plan(config, stages, gpu=False).predicted
    monkeypatch.setattr(RehearsedParts, "differing_micro_batches", 5)
    assert make_plan(config, stages, gpu=False).predicted == planned
    monkeypatch.setattr(RehearsedParts, "differing_micro_batches", 1)
    assert make_plan(config, stages, gpu=False).predicted != planned


def test_beside_a_process_group_it_says_that_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    with pytest.raises(RunError, match="cannot be forked beside a process group"):
        make_plan(RunConfig(**sections()), 1, gpu=False)


def fail(value: int) -> int:
    raise ZeroDivisionError(value)


def test_a_mistake_of_ours_in_a_child_is_no_refusal() -> None:
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        each_in_child(fail, [(1,)])
