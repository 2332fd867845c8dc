"""The plan: every entry of every parameter has one home, whatever the mesh; what cannot be cut is refused."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, MixtralConfig, Olmo2Config, Phi3Config, Qwen3Config

from collie_core.errors import ModelError
from collie_core.model.build import empty_model
from collie_core.model.family import StockFamily
from collie_core.model.partition import Partition, Rule, _balanced, pattern, plan

SIZES: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "phi3": Phi3Config(**SIZES),
    "olmo2": Olmo2Config(**SIZES),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
}
MESHES = [(1, 1), (2, 1), (4, 2), (8, 3), (1, 5)]


def plan_of(config: Any, tensor_size: int = 1, pipeline_size: int = 1, **options: Any) -> Partition:
    family = StockFamily(config.model_type, **options.pop("family", {}))
    model = empty_model(family, config)
    return plan(model, family, tensor_size=tensor_size, pipeline_size=pipeline_size, **options)


@pytest.mark.parametrize(("tensor_size", "pipeline_size"), MESHES)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_entry_of_every_parameter_has_one_home(name: str, tensor_size: int, pipeline_size: int) -> None:
    config = CONFIGS[name]
    made = plan_of(config, tensor_size, pipeline_size)
    whole = dict(empty_model(StockFamily(config.model_type), config).named_parameters(remove_duplicate=False))
    assert list(made.placements) == list(whole)
    for parameter, placement in made.placements.items():
        assert placement.shape == whole[parameter].shape
        assert 0 <= placement.stage < pipeline_size
        if placement.rule is None:
            continue
        rule = placement.rule
        assert sum(rule.blocks) == placement.shape[rule.dim]
        homes = torch.zeros(placement.shape[rule.dim], dtype=torch.long)
        for rank in range(tensor_size):
            for begin, end in rule.intervals(tensor_size, rank):
                homes[begin:end] += 1
            assert placement.local_shape(tensor_size, rank)[rule.dim] == rule.length(tensor_size, rank)
        assert homes.tolist() == [rule.copies] * len(homes), parameter
    layers = [made.owned_layers(stage) for stage in range(pipeline_size)]
    assert list(itertools.chain(*layers)) == list(range(5))
    assert all(layers)


def test_a_llama_is_cut_as_megatron_cuts_it() -> None:
    made = plan_of(CONFIGS["tied"], 4, 2).placements
    layer = "model.layers.0.self_attn."
    assert made[layer + "q_proj.weight"].rule == Rule(0, (64,), unit=8)
    assert made[layer + "k_proj.weight"].rule == Rule(0, (16,), unit=8, copies=2)  # 2 heads on 4 ranks
    assert made[layer + "o_proj.weight"].rule == Rule(1, (64,), unit=8)
    assert made["model.layers.0.mlp.down_proj.weight"].rule == Rule(1, (172,))
    assert made["model.embed_tokens.weight"].rule == made["lm_head.weight"].rule == Rule(0, (257,))
    assert made["lm_head.weight"].tied_to == "model.embed_tokens.weight"
    assert (made["model.embed_tokens.weight"].stage, made["lm_head.weight"].stage) == (0, 1)
    assert made["model.norm.weight"].stage == 1
    assert made["model.norm.weight"].rule is None


def test_packed_blocks_are_each_shared() -> None:
    rule = Rule(0, (6, 6))
    assert rule.intervals(2, 0) == [(0, 3), (6, 9)]
    assert rule.intervals(2, 1) == [(3, 6), (9, 12)]
    assert Rule(0, (7,)).intervals(4, 3) == [(6, 7)]
    assert Rule(0, (5,)).intervals(4, 3) == []  # as torch.chunk: two each, so nothing is left for the last


def test_the_word_of_the_family_is_over_that_of_transformers() -> None:
    family = {"tensor_plan": {"model.layers.*.mlp.gate_up_proj": "packed_colwise:2"}}
    made = plan_of(CONFIGS["phi3"], 2, family=family).placements
    assert made["model.layers.3.mlp.gate_up_proj.weight"].rule == Rule(0, (172, 172))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"tensor_size": 3}, "8 attention heads with 2 key-value heads; sizes that can: 1, 2, 4, 8"),
        ({"pipeline_size": 6}, "exceeds the 5 layers of the model; use at most 5"),
        ({"pipeline_size": 2, "cuts": [2, 2]}, r"cuts=\[2, 2\] must give each of the 2 stages"),
        ({"pipeline_size": 2, "cuts": [5, 0]}, "at least one of the 5 layers"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_the_sizes_that_can(sizes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ModelError, match=expected):
        plan_of(CONFIGS["llama"], **sizes)


def test_a_family_without_a_tensor_plan_is_refused_by_name() -> None:
    config = GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=64)
    assert plan_of(config, pipeline_size=2).cuts == (0, 1, 2)
    with pytest.raises(ModelError, match=r"declares how gpt2 is shared .* declare `tensor_plan`"):
        plan_of(config, tensor_size=2)


def test_an_unknown_style_is_refused_by_module() -> None:
    family = {"tensor_plan": {"model.layers.*.mlp.up_proj": "diagonal"}}
    with pytest.raises(ModelError, match=r"'diagonal' of model\.layers\.0\.mlp\.up_proj"):
        plan_of(CONFIGS["llama"], 2, family=family)


def test_a_parameter_outside_the_plan_is_refused() -> None:
    with pytest.raises(ModelError, match=r"model\.norm\.weight belongs to no part"):
        plan_of(CONFIGS["llama"], 1, 2, family={"pipeline_plan": ("embed_tokens", "layers")})


def test_balanced_cuts_have_the_smallest_largest_stage() -> None:
    layers, before, after = [3, 1, 4, 1, 5, 9, 2], 6, 5
    for size in range(1, 8):
        choices = [[0, *inner, len(layers)] for inner in itertools.combinations(range(1, len(layers)), size - 1)]

        def largest(bounds: list[int]) -> int:
            return max(
                sum(layers[begin:end]) + before * (begin == 0) + after * (end == len(layers))
                for begin, end in itertools.pairwise(bounds)
            )

        found = _balanced(layers, before, after, size)
        assert sum(found) == len(layers)
        assert largest([0, *itertools.accumulate(found)]) == min(map(largest, choices))


def test_uniform_and_explicit_cuts() -> None:
    assert plan_of(CONFIGS["llama"], 1, 3, cuts="uniform").cuts == (0, 1, 3, 5)
    assert plan_of(CONFIGS["llama"], 1, 3, cuts=[3, 1, 1]).cuts == (0, 3, 4, 5)


def test_names_become_patterns() -> None:
    assert pattern("model.layers.12.mlp.experts.3.w1") == "model.layers.*.mlp.experts.*.w1"
    assert pattern("h.0") == "h.*"
    assert pattern("block2.conv1") == "block2.conv1"
