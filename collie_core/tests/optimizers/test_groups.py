"""Parameter groups: every trainable parameter in one, by ordered patterns; decay and roles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from collie_core.config.base import OptimizerConfig
from collie_core.errors import RunError
from collie_core.optimizers.build import parameter_groups
from collie_core.topology import Topology


@pytest.fixture(scope="module")
def model() -> nn.Module:
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        attention_bias=True,
    )
    return LlamaForCausalLM(config)


def groups_of(model: nn.Module, *, roles: bool = False, **section: Any) -> list[dict[str, Any]]:
    config = OptimizerConfig(type="any", lr=0.1, **section)
    return parameter_groups(model, config, Topology(), roles=roles)


def named(model: nn.Module, groups: list[dict[str, Any]]) -> list[tuple[set[str], dict[str, Any]]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        ({names[id(p)] for p in group["params"]}, {key: value for key, value in group.items() if key != "params"})
        for group in groups
    ]


def test_vectors_do_not_decay(model: nn.Module) -> None:
    (matrices, decayed), (vectors, plain) = named(model, groups_of(model, weight_decay=0.3))
    assert decayed == {"weight_decay": 0.3}
    assert plain == {"weight_decay": 0.0}
    assert "model.embed_tokens.weight" in matrices
    assert "model.norm.weight" in vectors
    assert "model.layers.0.self_attn.q_proj.bias" in vectors
    assert matrices | vectors == {name for name, _ in model.named_parameters()}
    assert not matrices & vectors


def test_the_first_pattern_that_matches_decides(model: nn.Module) -> None:
    patterns = [
        {"match": "*.q_proj.*", "lr": 0.5},
        {"match": "*.bias", "weight_decay": 0.7},
        {"match": "*.layers.1.*", "lr": 0.2, "weight_decay": 0.1},
    ]
    groups = named(model, groups_of(model, weight_decay=0.3, param_groups=patterns))
    claimed = [name for names, _ in groups for name in names]
    assert sorted(claimed) == sorted(name for name, _ in model.named_parameters())  # each once
    by_name = {name: options for names, options in groups for name in names}
    assert by_name["model.layers.1.self_attn.q_proj.weight"] == {"lr": 0.5, "weight_decay": 0.3}
    assert by_name["model.layers.1.self_attn.q_proj.bias"] == {"lr": 0.5, "weight_decay": 0.0}  # a vector still
    assert by_name["model.layers.1.self_attn.k_proj.bias"] == {"weight_decay": 0.7}
    assert by_name["model.layers.1.mlp.up_proj.weight"] == {"lr": 0.2, "weight_decay": 0.1}
    assert by_name["model.layers.1.input_layernorm.weight"] == {"lr": 0.2, "weight_decay": 0.1}
    assert by_name["model.layers.0.mlp.up_proj.weight"] == {"weight_decay": 0.3}
    assert groups[0][1] == {"weight_decay": 0.3}  # whose learning rate is shown


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        ([{"match": "*.bais"}], r"param_groups\.0\.match='\*\.bais' matches no trainable parameter.*model\."),
        ([{"match": "*"}, {"match": "*.bias"}], r"param_groups\.1\.match='\*\.bias' matches .* taken.*move it up"),
    ],
)
def test_a_pattern_that_decides_nothing_is_an_error(model: nn.Module, patterns: Any, said: str) -> None:
    with pytest.raises(RunError, match=said):
        groups_of(model, param_groups=patterns)


def test_frozen_parameters_are_in_no_group_and_match_nothing(model: nn.Module) -> None:
    tied = LlamaForCausalLM(model.config)
    for name, parameter in tied.named_parameters():
        parameter.requires_grad_("layers.0" in name)
    assert {name.split(".")[2] for names, _ in named(tied, groups_of(tied)) for name in names} == {"0"}
    with pytest.raises(RunError, match="matches no trainable parameter"):
        groups_of(tied, param_groups=[{"match": "*.layers.1.*"}])
    with pytest.raises(RunError, match="no trainable parameter"):
        groups_of(tied.requires_grad_(False))


def test_roles(model: nn.Module) -> None:
    groups = named(model, groups_of(model, roles=True, weight_decay=0.1))
    roles = {name: options["role"] for names, options in groups for name in names}
    assert roles["model.layers.0.mlp.up_proj.weight"] == "hidden"
    assert roles["model.layers.0.self_attn.o_proj.weight"] == "hidden"
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert roles[name] == "other"
    assert len(roles) == len(list(model.parameters()))


def test_a_tied_embedding_is_one_parameter_of_one_group() -> None:
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    groups = groups_of(model, roles=True)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    torch.optim.AdamW(groups)  # which refuses a parameter in two groups
