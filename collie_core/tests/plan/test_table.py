"""The table of strategies: what is tried, what fits, and how fast the model of the hardware takes it to be."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from collie_core.cli import main
from collie_core.errors import RunError
from collie_core.plan.hardware import COMPUTE_SHARE, HARDWARE, LINK_SHARE, hardware_named
from collie_core.plan.table import Machines
from collie_core.plan.work import Work

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "run.yaml"
    sections = {
        "model": {"config": LLAMA},
        "tokenizer": "byte",
        "data": {"train": "unread.jsonl", "max_length": 32},
        "train": {"max_steps": 3, "gradient_accumulation_steps": 2},
    }
    found.write_text(json.dumps(sections))
    return found


def test_exchanges_between_nodes_take_the_network() -> None:
    one, two = (Machines(HARDWARE["h100"], 8, nodes, 2**30) for nodes in (1, 2))
    work = Work(0, Counter({(0, 4): 10**9}))
    assert one.seconds(work, "bfloat16") == pytest.approx(10**9 / (450e9 * LINK_SHARE))
    assert two.seconds(work, "bfloat16") == pytest.approx(10**9 / (50e9 * LINK_SHARE))
    near = Work(0, Counter({(0, 1): 10**9}))
    assert two.seconds(near, "bfloat16") == one.seconds(near, "bfloat16")
    assert one.seconds(Work(10**15), "bfloat16") == pytest.approx(1e15 / (989e12 * COMPUTE_SHARE))


def test_unknown_hardware_is_told_with_what_is_known() -> None:
    with pytest.raises(RunError, match=r"--hardware h9: not known; choose one of h100"):
        hardware_named("h9")


@pytest.mark.filterwarnings("ignore")  # DeepSpeed calls collectives that torch deprecates
def test_strategies_that_fit_are_ranked(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(path), "--table", "--gpus", "2", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    found = table["strategies"]
    speeds = [one["predicted_tokens_per_s"] for one in found]
    assert speeds == sorted(speeds, reverse=True)
    # Two tensor-parallel ranks, or data-parallel ones without and with ZeRO; one layer makes no two stages.
    assert len({tuple(one["overrides"][:4]) for one in found}) == 3
    assert {one["predicted_host_peak_bytes"] for one in found} == {0}
    assert len(found) == table["strategies_tried"] == 6
    assert all(0 < one["predicted_peak_bytes"] <= table["gpu_memory_bytes"] for one in found)
    plan = table["plan_of_first"]
    assert plan["batch"].startswith("4 samples per step")
    assert max(rank["predicted_peak_bytes"] for rank in plan["ranks"]) == found[0]["predicted_peak_bytes"]
    arguments = ["--table", "--gpus", "1", "--gpu-memory", "1KiB", "train.gradient_accumulation_steps=1"]
    assert main(["plan", str(path), *arguments]) == 1
    assert "none of 5 strategies fits on 1 h100" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_what_fits_only_with_offload_is_found_so(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = "model.config.hidden_size=256"
    arguments = ["plan", str(path), "--table", "--gpus", "1", "--gpu-memory", "4MiB", wide, "data.max_length=16"]
    arguments += ["deepspeed.zero_optimization.reduce_bucket_size=1000", "parallel.zero_stage=2"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "offload" in said.splitlines()[2]
    assert "parallel.offload_optimizer=true" in said
    assert "what is offloaded moved at 70% of 64 GB/s" in said
    assert main([*arguments, "--json", "--host-memory", "1MiB"]) == 1
    assert json.loads(capsys.readouterr().out)["strategies"] == []


def test_a_table_is_for_a_number_of_gpus(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(path), "--table"]) == 1
    assert "--table needs --gpus" in capsys.readouterr().err
    assert main(["plan", str(path), "--table", "--gpus", "3", "--nodes", "2"]) == 1
    assert "3 GPUs cannot stand in so many machines alike" in capsys.readouterr().err
