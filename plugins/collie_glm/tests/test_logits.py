"""ChatGLM 2 and 3 compute their equations, and are saved in the layout they came in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from glm_files import CHATGLM, Config, logits, random_tensors, write
from safetensors.torch import load_file
from transformers import GlmForCausalLM, PreTrainedModel

from collie_core.api import ModelError
from collie_core.config.model import ModelConfig
from collie_core.data.tokenizer import byte_tokenizer
from collie_core.model.build import new_model
from collie_core.model.export import save_pretrained
from collie_core.plugins import Plugins

CASES: dict[str, dict[str, Any]] = {
    "chatglm": CHATGLM,
    "without bias": CHATGLM | {"add_qkv_bias": False},
    "every head its own group": CHATGLM | {"multi_query_group_num": 8},
    "one group": CHATGLM | {"multi_query_group_num": 1},
}
IDS = torch.randint(3, 250, (2, 40), generator=torch.Generator().manual_seed(1))


def build(**section: Any) -> PreTrainedModel:
    return new_model(ModelConfig(**section), Plugins.discover(), byte_tokenizer(), torch.float32)


def assert_equations(model: PreTrainedModel, raw: Config, tensors: Any) -> None:
    with torch.no_grad():
        found = model(IDS).logits
    expected = logits(raw, tensors, IDS)
    assert expected.std() > 0.05
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_equations(case: str, tmp_path: Path) -> None:
    raw = CASES[case]
    tensors = random_tensors(raw)
    write(tmp_path, raw, tensors)
    model = build(model_name_or_path=str(tmp_path))
    assert isinstance(model, GlmForCausalLM)
    assert_equations(model, raw, tensors)


@pytest.mark.parametrize("case", ["chatglm", "one group"])
def test_what_is_loaded_is_saved_bit_for_bit(case: str, tmp_path: Path) -> None:
    raw = CASES[case]
    source, target = tmp_path / "source", tmp_path / "target"
    tensors = random_tensors(raw)
    write(source, raw, tensors | {"transformer.rotary_pos_emb.inv_freq": torch.ones(4)})  # as published files have it
    target.mkdir()
    save_pretrained(target, build(model_name_or_path=str(source)), byte_tokenizer(), dtype=torch.float32)
    after = load_file(target / "model.safetensors")
    assert sorted(after) == sorted(tensors)
    for name, value in tensors.items():
        assert torch.equal(after[name], value), name
    assert json.loads((target / "config.json").read_text()) == raw
    assert_equations(build(model_name_or_path=str(target)), raw, tensors)


def test_random_weights_are_exported_in_the_own_layout(tmp_path: Path) -> None:
    changes = ("architectures", "auto_map", "torch_dtype", "transformers_version")
    torch.manual_seed(0)
    model = build(config={key: value for key, value in CHATGLM.items() if key not in changes})
    for parameter in model.parameters():
        parameter.data.normal_(std=0.1)
    save_pretrained(tmp_path, model, byte_tokenizer(), dtype=torch.float32)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["architectures"] == ["ChatGLMModel"]
    assert_equations(model, raw, load_file(tmp_path / "model.safetensors"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"position_encoding_2d": True}, "the first ChatGLM-6B"),
        ({"new_norm": 1}, "the meaning of new_norm is not known here"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True is not supported"),
        ({"rope_ratio": 50}, "rope_ratio=50 is not supported; it must be 1"),
        ({"add_bias_linear": True}, "add_bias_linear=True is not supported"),
        ({"quantization_bit": 4}, "quantization_bit=4 is not supported"),
        ({"multi_query_attention": False}, "multi_query_attention=False is not supported"),
        ({"vocab_size": 300}, "vocab_size=300 is not padded_vocab_size=259"),
    ],
)
def test_what_the_stock_class_cannot_compute_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    write(tmp_path, CHATGLM | change, {"x": torch.ones(1)})
    with pytest.raises(ModelError, match=said):
        build(model_name_or_path=str(tmp_path))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"transformer.encoder.layers.1.self_attention.query_key_value.weight": None}, "missing: .*q_proj"),
        ({"transformer.encoder.layers.1.mlp.other.weight": torch.ones(2)}, "unexpected: .*mlp.other.weight"),
        ({"transformer.encoder.layers.1.self_attention.query_key_value.weight": torch.ones(200, 64)}, "shape of "),
    ],
)
def test_files_that_do_not_fit_are_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    tensors = {**random_tensors(CHATGLM), **change}
    write(tmp_path, CHATGLM, {name: value for name, value in tensors.items() if value is not None})
    with pytest.raises(ModelError, match=said):
        build(model_name_or_path=str(tmp_path))
