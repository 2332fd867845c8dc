"""`collie verify parity`: topologies that train alike pass, and where one does not, the module at fault is named."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from collie_core.api import RunConfig, RunError
from collie_core.cli import main
from collie_core.data.loader import Layout, collate
from collie_core.parity import (
    Record,
    Sizes,
    _fingerprints,
    differences,
    first_difference,
    first_gradient_difference,
    largest,
    record,
    rehearsal,
)

TOLERANCE = 1e-4

PLUGIN = """
import os
from collie_core.api import Component, StockFamily, hookimpl

# Without a word on how its halves are packed: each rank takes a half of the wrong kind.
FAMILY = StockFamily(
    "phi3",
    tensor_plan={"model.layers.*.mlp.gate_up_proj": "colwise", "model.layers.*.mlp.down_proj": "rowwise"},
)
PHI3 = Component(build="collie_wrong:FAMILY", summary="Phi 3, wrongly declared")

@hookimpl
def collie_run_start(run):
    if run.topology.world_size == 1:
        return
    if os.environ.get("WRONG") == "forward":
        for name, module in run.model.named_modules():
            if name == "model.layers.1.mlp.up_proj":
                module.register_forward_hook(lambda module, inputs, output: output * 1.001)
    if os.environ.get("WRONG") == "backward":
        for name, parameter in run.model.named_parameters():
            if name == "model.layers.1.self_attn.o_proj.weight":
                parameter.register_hook(lambda gradient: gradient * 1.001)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package with a wrongly declared family, and with hooks that do wrong as the environment says."""
    folder = tmp_path_factory.mktemp("site")
    info = folder / "collie_wrong-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: collie-wrong\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[collie.hooks]\nwrong = collie_wrong\n\n[collie.model]\nphi3 = collie_wrong:PHI3\n"
    )
    (folder / "collie_wrong.py").write_text(PLUGIN)
    return folder


def sections(data: Path, cache: Path, **model: Any) -> dict[str, Any]:
    return {
        "model": model,
        "tokenizer": "byte",
        "data": {"train": str(data), "max_length": 128, "cache_dir": str(cache)},
        "train": {"global_batch_size": 8, "per_device_train_batch_size": 2},
        "optimizer": {"type": "adamw", "lr": 1e-3},
    }


def rehearse(run: str, topology: str, folder: Path, site: Path, wrong: str) -> None:
    """This rank's part of the record."""
    sys.path.insert(0, str(site))  # where the fork finds the entry points
    os.environ["WRONG"] = wrong
    sizes = Sizes.parse(topology)
    changed = rehearsal(RunConfig.from_text(run), sizes, global_batch=8, steps=1, folder=folder)
    record(RunConfig.from_text(run, changed), folder)


@pytest.fixture
def recorded(zygote: Any, site: Path, tmp_path: Path) -> Any:
    def run(named: dict[str, Any], topology: str, wrong: str = "", name: str = "") -> Record:
        folder = tmp_path / (name or topology)
        folder.mkdir()
        arguments = (yaml.safe_dump(named), topology, folder, site, wrong)
        zygote.run(__file__, "rehearse", world_size=Sizes.parse(topology).processes, args=arguments)
        return Record.read(folder)

    return run


@pytest.mark.slow
def test_the_command_compares_two_topologies(
    tiny_llama: Path, instructions: Path, site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(sections(instructions, tmp_path, model_name_or_path=str(tiny_llama))))

    def verify(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "collie_core.cli", "verify", "parity", str(path), *words]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(site)} | variables
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)

    same = verify("--a", "tp2", "train.seed=3", "--steps", "2")
    assert same.returncode == 0, same.stdout + same.stderr
    assert "2 steps of 8 samples, float32" in same.stdout
    assert "the same: losses differ by at most" in same.stdout
    assert not (tmp_path / "runs").exists()

    other = verify("--a", "dp2zero1", "--b", "dp1", "--steps", "1", WRONG="forward")
    assert other.returncode == 1, other.stdout + other.stderr
    assert "NOT the same" in other.stdout
    assert "the first module whose output differs is model.layers.1.mlp.up_proj" in other.stdout

    def mistake(*words: str) -> str:
        assert main(["verify", "parity", str(path), *words]) in (1, 2)
        out, err = capsys.readouterr()
        assert out == ""  # before anything was started
        return err

    assert "sizes that can: 1, 2, 4" in mistake("--a", "tp3")
    assert "--a is missing" in mistake()
    assert "steps 0: must be at least 1" in mistake("--a", "tp2", "--steps", "0")


@pytest.mark.slow
def test_all_modules_agree_on_every_topology(
    recorded: Any, tiny_llama: Path, instructions: Path, tmp_path: Path
) -> None:
    run = sections(instructions, tmp_path, model_name_or_path=str(tiny_llama))
    alone = recorded(run, "dp1")
    everything = [f"model.layers.{layer}.{name}" for layer in range(2) for name in LAYER]
    assert set(everything) | {"model.embed_tokens", "model.norm", "lm_head"} <= set(alone.modules)
    assert all(set(samples) == set(map(str, range(8))) for samples in alone.modules.values())
    for topology in ("tp2", "pp2", "dp2", "dp2zero3"):
        other = recorded(run, topology)
        found = {difference.where: difference.size for difference in differences(other, alone)}
        assert set(everything) - ({f"model.layers.{layer}.mlp.act_fn" for layer in range(2)}) <= set(found)
        assert max(found.values()) <= TOLERANCE, topology
        assert first_gradient_difference(other, alone, TOLERANCE) is None
        assert bool(other.gradients) == ("zero" not in topology)
        assert largest(other.losses, alone.losses) <= 1e-5


LAYER = (
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "act_fn", "down_proj")),
    *("input_layernorm", "post_attention_layernorm", "self_attn", "mlp"),
)


@pytest.mark.parametrize("topology", ["tp2", "pp2", "dp2"])
def test_a_perturbed_module_is_named(
    topology: str, recorded: Any, tiny_llama: Path, instructions: Path, tmp_path: Path
) -> None:
    run = sections(instructions, tmp_path, model_name_or_path=str(tiny_llama))
    found = first_difference(recorded(run, topology, "forward"), recorded(run, "dp1"), TOLERANCE)
    assert found is not None
    assert found.where == "model.layers.1.mlp.up_proj"
    assert 5e-4 < found.size < 0.1


def test_a_wrong_gradient_is_named(recorded: Any, tiny_llama: Path, instructions: Path, tmp_path: Path) -> None:
    run = sections(instructions, tmp_path, model_name_or_path=str(tiny_llama))
    wrong, right = recorded(run, "tp2", "backward"), recorded(run, "dp1")
    assert first_difference(wrong, right, TOLERANCE) is None
    found = first_gradient_difference(wrong, right, TOLERANCE)
    assert found is not None
    assert found.where == "model.layers.1.self_attn.o_proj.weight"
    assert found.size == pytest.approx(1e-3, rel=0.01)


def test_a_wrong_declaration_of_an_outside_family_is_caught(recorded: Any, instructions: Path, tmp_path: Path) -> None:
    shape = {"model_type": "phi3", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    run = sections(instructions, tmp_path, config=shape)
    right, wrong = recorded(run, "dp1"), recorded(run, "tp2")
    found = first_difference(wrong, right, TOLERANCE)
    assert found is not None
    assert found.where == "model.layers.0.mlp.down_proj"  # gate_up_proj itself is right, what is made of it is not
    assert largest(wrong.losses, right.losses) > 1e-5
    assert first_difference(recorded(run, "pp2"), right, TOLERANCE) is None  # the stages do not ask for it


def test_a_fingerprint_depends_on_the_sample_alone() -> None:
    samples = [{"input_ids": torch.arange(length).numpy(), "labels": torch.arange(length).numpy()} for length in (5, 3)]
    batches = {
        "padded": [[samples[0] | {"position": 4}], [samples[1] | {"position": 9}]],
        "packed": [[samples[0] | {"position": 4}, samples[1] | {"position": 9}]],
        "turned": [[samples[1] | {"position": 9}, samples[0] | {"position": 4}]],
    }
    table = torch.randn(8, 2, 3, generator=torch.Generator().manual_seed(0))  # a module of its own dimensions
    prints = []
    for rows in batches.values():
        batch = collate(rows, pad_token_id=7, packing=False)
        prints.append(_fingerprints(table[batch.input_ids], batch.layout))
    assert prints[0].keys() == {"4", "9"}
    for other in prints[1:]:
        for position, found in other.items():
            assert found == pytest.approx(prints[0][position], rel=1e-12)
    assert prints[0]["4"] != pytest.approx(prints[0]["9"], rel=1e-3)


def test_only_outputs_of_one_row_per_sample_are_looked_at() -> None:
    layout: Layout = (((0, 4),), ((1, 3),))
    assert _fingerprints(torch.ones(2, 4, 8), layout).keys() == {"0", "1"}
    assert _fingerprints(torch.ones(8, 8), layout).keys() == {"0", "1"}  # experts see a flat list
    assert _fingerprints(torch.ones(2, 2, 8), layout) == {}  # a share of the positions
    assert _fingerprints(torch.ones(1, 4, 8), layout) == {}
    assert _fingerprints(torch.ones(3, 8), layout) == {}


def test_what_is_not_a_number_differs() -> None:
    assert largest([1.0, float("nan")], [1.0, float("nan")]) == float("inf")
    assert largest([1.0, 100.0], [1.0, 101.0], relative=True) == pytest.approx(1 / 101)
    broken = Record(modules={"a": {"0": [[1.0, float("nan"), 0.0, 0.0]]}})
    found = first_difference(broken, broken, 1e-4)
    assert found is not None
    assert found.where == "a"


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("dp1", Sizes()),
        ("tp2pp2dp2zero1", Sizes(2, 2, 2, 1)),
        ("zero3dp4", Sizes(dp=4, zero=3)),
        ("pp12", Sizes(pp=12)),
    ],
)
def test_topologies_have_names(name: str, sizes: Sizes) -> None:
    assert Sizes.parse(name) == sizes


@pytest.mark.parametrize("name", ["", "tp", "tp2x", "tp0", "tp2tp4", "dp2zero4", "2tp", "tp2 pp2", "ep2"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(RunError, match="is no topology"):
        Sizes.parse(name)


def test_a_rehearsal_keeps_the_batch_and_leaves_out_what_its_topology_has_not(tmp_path: Path) -> None:
    config = RunConfig(
        parallel={
            "tensor_parallel_size": 2,
            "sequence_parallel": True,
            "pipeline_parallel_size": 2,
            "pipeline_cuts": [3, 1],
            "zero_stage": 2,
            "offload_optimizer": True,
        },
        deepspeed={"wall_clock_breakdown": True},
        train={"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "num_train_epochs": 2},
        data={"eval": "held-out.jsonl"},
        evaluation={"steps": 10},
        report_to=["tensorboard"],
    )
    for name in ("dp1", "dp4zero3", "tp2pp2zero2"):
        sizes = Sizes.parse(name)
        changed = rehearsal(config, sizes, global_batch=12, steps=2, folder=tmp_path)
        small = RunConfig.from_text(config.to_yaml(), changed)
        assert small.global_batch_size(sizes.dp) == 12
        assert small.per_device_train_batch_size(sizes.dp) == (3 if sizes.dp == 4 else 4)
        assert small.parallel.sequence_parallel == (sizes.tp == 2)
        assert small.parallel.pipeline_cuts == ([3, 1] if sizes.pp == 2 else "parameters")
        assert (small.train.max_steps, small.data.eval, small.model.dtype) == (2, [], "float32")
    size = {"per_device_train_batch_size": 4}
    in_backward = RunConfig(model={"model_name_or_path": "m"}, train=size, optimizer="lomo")  # it cannot accumulate
    changed = rehearsal(in_backward, Sizes(dp=1), global_batch=12, steps=2, folder=tmp_path)
    assert RunConfig.from_text(in_backward.to_yaml(), changed).per_device_train_batch_size(1) == 12
    with pytest.raises(RunError, match="5 data-parallel ranks cannot share a global batch of 12 evenly"):
        rehearsal(config, Sizes(dp=5), global_batch=12, steps=1, folder=tmp_path)
