"""Random weights: distributed as transformers initialises them, and the same on every topology."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CONFIGS, config_of, family_of, tensors
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from collie_core.config.parallel import ParallelConfig
from collie_core.errors import ModelError
from collie_core.model.build import build_model
from collie_core.model.part import part_of
from collie_core.model.weights import save
from collie_core.topology import Topology

SHARDED = ("llama_tied", "llama_one_kv_head", "glm4_moe", "fused")


def random(name: str, seed: int = 3, **options: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    return build_model(family_of(name), config_of(name), None, **options)


def wide(**options: Any) -> LlamaConfig:
    config = LlamaConfig(
        vocab_size=500, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, **options
    )
    config.dtype = torch.float32
    return config


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_is_distributed_as_transformers_does_it(name: str) -> None:
    torch.manual_seed(0)
    theirs = type(random(name))(config_of(name)).state_dict()
    for key, ours in random(name).state_dict().items():
        spread = theirs[key].std().item() if ours.numel() > 1 else 0.0
        assert ours.mean().item() == pytest.approx(theirs[key].mean().item(), abs=5 * spread / math.sqrt(ours.numel()))
        assert ours.std().item() == pytest.approx(spread, rel=0.5 if spread else None)


def test_the_spread_is_that_of_the_config(tmp_path: Path) -> None:
    model = build_model(family_of("llama"), wide(initializer_range=0.1), None)
    layer = model.model.layers[1]
    assert layer.mlp.up_proj.weight.std().item() == pytest.approx(0.1, rel=0.03)
    assert torch.equal(layer.input_layernorm.weight, torch.ones(128))


def test_a_layer_that_scales_its_projection_has_its_say() -> None:
    """GPT-2 divides the spread of projections into the residual stream by the root of their number."""
    config = config_of("gpt2")
    block = random("gpt2").transformer.h[0]
    assert block.mlp.c_proj.weight.std().item() == pytest.approx(0.02 / math.sqrt(2 * config.n_layer), rel=0.15)
    assert block.mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.15)


def test_modules_have_values_of_their_own_which_the_seed_decides() -> None:
    first, again, other = random("llama"), random("llama"), random("llama", seed=4)
    for one, same, different in zip(first.parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, same)
        assert one.ndim == 1 or not torch.equal(one, different)
    layers = first.model.layers
    assert not torch.equal(layers[0].mlp.up_proj.weight, layers[1].mlp.up_proj.weight)
    assert not torch.equal(layers[0].mlp.up_proj.weight, layers[0].mlp.gate_proj.weight)


def test_the_callers_random_state_moves_by_one_draw() -> None:
    torch.manual_seed(3)
    torch.randint(2**63 - 1, ())
    expected = torch.rand(3)
    random("llama")
    assert torch.equal(torch.rand(3), expected)


def test_the_padding_row_of_an_embedding_is_zero() -> None:
    embedding = random("llama").get_input_embeddings()
    assert embedding.padding_idx == 0
    assert embedding.weight[0].abs().sum() == 0


def test_a_parameter_that_the_family_leaves_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    built = LlamaForCausalLM.__init__

    def with_more(self: Any, config: Any) -> None:
        built(self, config)
        self.model.scale = nn.Parameter(torch.empty(3))

    monkeypatch.setattr(LlamaForCausalLM, "__init__", with_more)
    with pytest.raises(ModelError, match=r"model\.scale has no random weights: the _init_weights of LlamaForCausalLM"):
        random("llama")


def write_random(tp: int, pp: int, folder: str) -> None:
    parallel = ParallelConfig(tensor_parallel_size=tp, pipeline_parallel_size=pp)
    topology = Topology.start(parallel)
    for name in SHARDED:
        model = random(name, topology=topology, parallel=parallel)
        part = part_of(model)
        assert part is not None
        target = Path(folder) / f"{name}-{tp}-{pp}"
        target.mkdir(exist_ok=True)
        save(target, model, part, dtype=torch.float32)


@pytest.mark.slow
def test_every_topology_has_the_same_weights(zygote: Any, tmp_path: Path) -> None:
    write_random(1, 1, str(tmp_path))
    for tp, pp in ((2, 1), (1, 2), (2, 2)):
        zygote.run(__file__, "write_random", world_size=tp * pp, args=(tp, pp, str(tmp_path)))
    for name in SHARDED:
        expected = tensors(tmp_path / f"{name}-1-1")
        for tp, pp in ((2, 1), (1, 2), (2, 2)):
            found = tensors(tmp_path / f"{name}-{tp}-{pp}")
            assert found.keys() == expected.keys()
            assert all(torch.equal(value, found[key]) for key, value in expected.items()), name
