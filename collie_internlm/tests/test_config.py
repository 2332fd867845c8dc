"""config.json of InternLM 1 and 2 in the words of llama, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from internlm_files import INTERNLM as FIRST
from internlm_files import INTERNLM2 as SECOND
from internlm_files import INTERNLM3 as THIRD

from collie_core.api import ModelError
from collie_internlm.family import INTERNLM, INTERNLM2, INTERNLM3

# config.json with the keys and values of the published internlm-20b and internlm2_5-7b.
INTERNLM_20B: dict[str, Any] = {
    "architectures": ["InternLMForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_internlm.InternLMConfig",
        "AutoModel": "modeling_internlm.InternLMForCausalLM",
        "AutoModelForCausalLM": "modeling_internlm.InternLMForCausalLM",
    },
    "bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "intermediate_size": 13824,
    "max_position_embeddings": 4096,
    "model_type": "internlm",
    "num_attention_heads": 40,
    "num_hidden_layers": 60,
    "num_key_value_heads": 40,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "vocab_size": 103168,
    "rotary": {"base": 10000, "type": "dynamic"},
}
INTERNLM2_5_7B: dict[str, Any] = {
    "architectures": ["InternLM2ForCausalLM"],
    "attn_implementation": "eager",
    "auto_map": {
        "AutoConfig": "configuration_internlm2.InternLM2Config",
        "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
        "AutoModel": "modeling_internlm2.InternLM2ForCausalLM",
    },
    "bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "internlm2",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.0",
    "use_cache": True,
    "vocab_size": 92544,
    "pretraining_tp": 1,
}


def test_internlm_20b() -> None:
    config = INTERNLM.make_config(INTERNLM_20B)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (5120, 60, 40)
    assert (config.num_key_value_heads, config.head_dim, config.intermediate_size) == (40, 128, 13824)
    assert (config.attention_bias, config.mlp_bias, config.tie_word_embeddings) == (False, False, False)
    assert (config.vocab_size, config.max_position_embeddings, config.rms_norm_eps) == (103168, 4096, 1e-6)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    assert config.rope_parameters == {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 1.0}


def test_internlm2_5_7b() -> None:
    config = INTERNLM2.make_config(INTERNLM2_5_7B)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (4096, 32, 32)
    assert (config.num_key_value_heads, config.head_dim, config.intermediate_size) == (8, 128, 14336)
    assert (config.attention_bias, config.mlp_bias, config.tie_word_embeddings) == (False, False, False)
    assert (config.vocab_size, config.max_position_embeddings, config.rms_norm_eps) == (92544, 32768, 1e-5)
    assert config.rope_parameters == {"rope_type": "dynamic", "rope_theta": 1000000.0, "factor": 2.0}


def test_internlm3_is_understood_by_transformers() -> None:
    config = INTERNLM3.make_config(THIRD)
    assert (config.attention_bias, config.mlp_bias, config.head_dim) == (False, False, 16)
    assert config.rope_parameters == {"rope_type": "dynamic", "rope_theta": 50000000, "factor": 6.0}


@pytest.mark.parametrize("family", [INTERNLM, INTERNLM2])
def test_a_missing_key_has_the_default_of_the_published_class(family: Any) -> None:
    config = family.make_config({"model_type": family.model_type})
    assert (config.vocab_size, config.attention_bias, config.pad_token_id) == (103168, True, 0)
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (4096, 11008, 32)
    assert (config.num_key_value_heads, config.max_position_embeddings, config.rms_norm_eps) == (32, 2048, 1e-6)
    assert config.rope_parameters["rope_theta"] == 10000.0
    assert config.rope_parameters["rope_type"] == ("dynamic" if family is INTERNLM else "default")


@pytest.mark.parametrize(
    ("family", "keys", "expected"),
    [
        (INTERNLM, {"rotary": {"type": "origin", "base": 500}}, {"rope_type": "default", "rope_theta": 500.0}),
        (INTERNLM, {"rotary": {"type": "dynamic", "base": 500, "scaling_factor": 2}}, {"factor": 2.0}),
        (INTERNLM, {"rotary": None}, {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 1.0}),
        (INTERNLM2, {"rope_scaling": None}, {"rope_type": "default", "rope_theta": 1000000.0}),
        (INTERNLM2, {"rope_scaling": {"type": "linear", "factor": 4}}, {"rope_type": "linear", "factor": 4.0}),
    ],
)
def test_rotary_embedding_is_translated(family: Any, keys: dict[str, Any], expected: dict[str, Any]) -> None:
    raw = (FIRST if family is INTERNLM else SECOND) | keys
    assert expected.items() <= family.make_config(raw).rope_parameters.items()


@pytest.mark.parametrize(
    ("family", "keys", "said"),
    [
        (INTERNLM, {"window_size": 7, "qk_norm": True}, "internlm: the meaning of qk_norm, window_size is not known"),
        (INTERNLM, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "internlm: the meaning of rope_scaling"),
        (INTERNLM, {"rotary": {"type": "yarn", "base": 1}}, "rotary.type='yarn' is unknown; it is origin or dynamic"),
        (INTERNLM, {"rotary": {"type": "dynamic", "scale": 2}}, "internlm: rotary: the meaning of scale is not known"),
        (INTERNLM, {"rotary": {"scaling_factor": 0.5}}, r"rotary.scaling_factor=0.5 must be a number, at least 1"),
        (INTERNLM, {"rotary": "dynamic"}, "internlm: rotary='dynamic' must be a mapping"),
        (INTERNLM, {"num_key_value_heads": 4}, "num_key_value_heads=4 and num_attention_heads=8"),
        (INTERNLM, {"architectures": ["InternLM2ForCausalLM"]}, "set model_type to internlm2"),
        (INTERNLM2, {"quantization_config": {"bits": 4}}, "internlm2: the meaning of quantization_config"),
        (INTERNLM2, {"rotary": {"type": "dynamic"}}, "internlm2: the meaning of rotary"),
        (INTERNLM2, {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling.type='yarn' is unknown"),
        (INTERNLM2, {"rope_scaling": {"type": "dynamic"}}, "rope_scaling.factor=None must be a number"),
        (INTERNLM2, {"rope_scaling": {"type": "dynamic", "factor": 2.0, "low": 1}}, "rope_scaling: the meaning of low"),
        (INTERNLM2, {"num_attention_heads": 7}, "multiple of the number of attention heads"),
        (INTERNLM2, {"bias": "yes"}, "attention_bias"),
    ],
)
def test_what_could_change_the_numbers_is_refused_by_name(family: Any, keys: dict[str, Any], said: str) -> None:
    raw = (FIRST if family is INTERNLM else SECOND) | keys
    with pytest.raises(ModelError, match=said):
        family.make_config(raw)


def test_the_raw_config_is_left_alone_and_written_back() -> None:
    raw = {**SECOND, "rope_scaling": dict(SECOND["rope_scaling"])}
    config = INTERNLM2.make_config(raw)
    assert raw == SECOND
    import torch

    config.dtype = torch.bfloat16
    assert INTERNLM2.write_config(config, raw) == SECOND | {"torch_dtype": "bfloat16"}
