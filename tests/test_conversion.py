"""Weights through every topology: logits are transformers' own, and what is loaded is written back bit for bit."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import CONFIGS, read_tensors, reference, write_family
from topologies import FAMILIES, sizes_of, world_size_of
from transformers import AutoModelForCausalLM

from collie_core.config.model import ModelConfig
from collie_core.config.parallel import ParallelConfig
from collie_core.config.tokenizer import TokenizerConfig
from collie_core.data.tokenizer import build_tokenizer
from collie_core.model.build import load_pretrained
from collie_core.model.export import save_pretrained, write_folder
from collie_core.model.stages import borrow_head, lend
from collie_core.plugins import Plugins
from collie_core.topology import Topology

IDS = torch.randint(3, 250, (2, 40), generator=torch.Generator().manual_seed(2))


def load(topology_name: str, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Topology, Any]:
    """This rank's part of a model; under ZeRO-3 taken apart while it is loaded."""
    sizes = sizes_of(topology_name)
    parallel = ParallelConfig(
        tensor_parallel_size=sizes["tp"], pipeline_parallel_size=sizes["pp"], zero_stage=sizes["zero"]
    )
    topology = Topology.start(parallel)
    section = ModelConfig(model_name_or_path=str(folder))
    store = None
    if sizes["zero"] == 3:
        from collie_core.engine.deepspeed_config import deepspeed_config
        from collie_core.engine.zero3 import Zero3Store

        config = deepspeed_config(
            parallel=parallel,
            dtype=dtype,
            micro_batch_size=1,
            data_parallel_size=topology.dp.size,
            max_grad_norm=None,
            overrides={},
        )
        store = Zero3Store(topology, config, dtype)
    tokenizer = build_tokenizer(TokenizerConfig(), section)
    model = load_pretrained(
        section, Plugins.discover(), tokenizer, dtype, topology=topology, parallel=parallel, store=store
    )
    borrow_head(model)
    return model, topology, tokenizer


def logits_of_all(topology_name: str, folder: Path, names: list[str]) -> dict[str, Any]:
    """The logits of each family, as every rank gets them."""
    found = {}
    for name in names:
        model, _, _ = load(topology_name, folder / name)
        lend(model)
        with torch.no_grad():
            found[name] = model(IDS % model.config.vocab_size, use_cache=False).logits.float().numpy()
    return found


def copy_all(topology_name: str, folder: Path, output: Path, names: list[str], dtype: str) -> None:
    """Load and save each of `names`."""
    from collie_core.engine.zero3 import gathered_on_first
    from collie_core.model.weights import stays_whole

    for name in names:
        model, topology, tokenizer = load(topology_name, folder / name, getattr(torch, dtype))
        gathered: Any = stays_whole
        if sizes_of(topology_name)["zero"] == 3:
            gathered = partial(gathered_on_first, axis=topology.dp, device=topology.device)

        def write(place: Path, model: Any = model, tokenizer: Any = tokenizer, gathered: Any = gathered) -> None:
            save_pretrained(place, model, tokenizer, dtype=getattr(torch, dtype), gathered=gathered)

        write_folder(output / name, write, topology)


@pytest.fixture(scope="module")
def sharded_families(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of several files each, and of one file."""
    folder = tmp_path_factory.mktemp("sharded")
    for name in CONFIGS:
        if name != "olmo2":
            write_family(folder / name, name, shards=3 if name != "llama" else 1)
    return folder


@pytest.mark.parametrize("topology", ["dp1", "tp2", "tp4", "tp8", "pp2", "pp3", "tp2pp2"])
def test_logits_are_those_of_transformers(topology: str, zygote: Any, sharded_families: Path) -> None:
    names = [name for name in FAMILIES if topology != "pp3" or name != "llama1"]
    ranks = zygote.run(
        __file__, "logits_of_all", world_size=world_size_of(topology), args=(topology, sharded_families, names)
    )
    for name in names:
        with torch.no_grad():
            expected = reference(sharded_families / name, name)(IDS).logits
        for rank in ranks:
            torch.testing.assert_close(torch.from_numpy(rank[name]), expected, rtol=0, atol=1e-4)


@pytest.mark.real
@pytest.mark.parametrize("topology", ["tp4", "pp5", "tp2pp2"])
def test_logits_of_a_real_model_are_those_of_transformers(topology: str, zygote: Any, real_data: Path) -> None:
    name = "stories260K-hf"
    ranks = zygote.run(
        __file__, "logits_of_all", world_size=world_size_of(topology), args=(topology, real_data, [name])
    )
    model = AutoModelForCausalLM.from_pretrained(real_data / name, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(IDS).logits
    for rank in ranks:
        torch.testing.assert_close(torch.from_numpy(rank[name]), expected, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("topology", ["tp4", "tp8", "pp3", "tp2pp2", "dp3zero3", "tp2dp2zero3"])
def test_what_is_loaded_is_written_back_bit_for_bit(
    topology: str, zygote: Any, sharded_families: Path, tmp_path: Path
) -> None:
    names = [name for name in CONFIGS if name != "olmo2"]
    zygote.run(
        __file__,
        "copy_all",
        world_size=world_size_of(topology),
        args=(topology, sharded_families, tmp_path, names, "float32"),
    )
    for name in names:
        original, written = read_tensors(sharded_families / name), read_tensors(tmp_path / name)
        assert original.keys() == written.keys()
        for key, value in original.items():
            assert torch.equal(written[key], value), f"{name}: {key}"


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("topology", ["tp4", "pp3", "tp2pp2", "dp2zero3"])
def test_a_real_model_is_written_back_bit_for_bit(topology: str, zygote: Any, real_data: Path, tmp_path: Path) -> None:
    name = "stories260K-hf"
    zygote.run(
        __file__,
        "copy_all",
        world_size=world_size_of(topology),
        args=(topology, real_data, tmp_path, [name], "float32"),
    )
    original, written = read_tensors(real_data / name), read_tensors(tmp_path / name)
    assert original.keys() == written.keys()
    assert all(torch.equal(written[key], value) for key, value in original.items())
