"""The models that CoLLiE builds compute the papers' equations, and are saved in the layout they came in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from internlm_files import INTERNLM, INTERNLM2, INTERNLM3, logits, random_tensors, write
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from collie_core.api import ModelError
from collie_core.config.model import ModelConfig
from collie_core.data.tokenizer import byte_tokenizer
from collie_core.model.build import new_model
from collie_core.model.export import save_pretrained
from collie_core.plugins import Plugins

CASES: dict[str, dict[str, Any]] = {
    "internlm": INTERNLM,
    "internlm without bias": INTERNLM | {"bias": False},
    "internlm, tied": INTERNLM | {"tie_word_embeddings": True},
    "internlm, plain rotary": INTERNLM | {"rotary": {"base": 5000, "type": "origin"}},
    "internlm, scaled rotary": INTERNLM | {"rotary": {"base": 10000, "type": "dynamic", "scaling_factor": 3.0}},
    "internlm2": INTERNLM2,
    "internlm2, tied and with bias": INTERNLM2 | {"tie_word_embeddings": True, "bias": True},
    "internlm2, every head its own": INTERNLM2 | {"num_key_value_heads": 8},
    "internlm2, one key-value head": INTERNLM2 | {"num_key_value_heads": 1},
    "internlm2, plain rotary": INTERNLM2 | {"rope_scaling": None},
    "internlm2, linear rotary": INTERNLM2 | {"rope_scaling": {"type": "linear", "factor": 3.0}},
    "internlm3": INTERNLM3,
}
BEYOND = 200  # positions; the models are made for 128


def build(**section: Any) -> PreTrainedModel:
    return new_model(ModelConfig(**section), Plugins.discover(), byte_tokenizer(), torch.float32)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_equations(case: str, tmp_path: Path) -> None:
    raw = CASES[case]
    tensors = random_tensors(raw)
    write(tmp_path, raw, tensors, shards=3)
    model = build(model_name_or_path=str(tmp_path))
    assert isinstance(model, LlamaForCausalLM)
    generator = torch.Generator().manual_seed(1)
    for length in (1, 40, BEYOND):
        ids = torch.randint(raw["vocab_size"], (2, length), generator=generator)
        with torch.no_grad():
            found = model(ids).logits
        expected = logits(raw, tensors, ids)
        assert expected.std() > 0.3
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)


def test_the_equations_tell_rotary_embeddings_apart() -> None:
    ids = torch.randint(259, (1, BEYOND), generator=torch.Generator().manual_seed(1))
    tensors = random_tensors(INTERNLM2)
    dynamic, plain = (logits(CASES[case], tensors, ids) for case in ("internlm2", "internlm2, plain rotary"))
    assert (dynamic - plain).abs().max() > 0.1


@pytest.mark.parametrize("case", ["internlm", "internlm2", "internlm2, tied and with bias", "internlm3"])
def test_what_is_loaded_is_saved_bit_for_bit(case: str, tmp_path: Path) -> None:
    raw = CASES[case]
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    write(source, raw, random_tensors(raw), shards=2)
    save_pretrained(target, build(model_name_or_path=str(source)), byte_tokenizer(), dtype=torch.float32)
    before, after = tensors_of(source), tensors_of(target)
    assert sorted(before) == sorted(after)
    for name, value in before.items():
        assert after[name].dtype == value.dtype
        assert torch.equal(after[name], value), name
    written = json.loads((target / "config.json").read_text())
    assert written["model_type"] == raw["model_type"]
    if raw is not INTERNLM3:  # transformers writes the one it knows in its own words
        assert written == raw
    ids = torch.arange(40)[None]
    with torch.no_grad():
        again = build(model_name_or_path=str(target))(ids).logits
    torch.testing.assert_close(again.double(), logits(raw, before, ids), rtol=0, atol=1e-4)


def test_random_weights_are_exported_in_the_own_layout(tmp_path: Path) -> None:
    sizes = {key: INTERNLM2[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "rope_scaling")}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 2, "bias": False, "rms_norm_eps": 1e-6}
    torch.manual_seed(0)
    model = build(config={"model_type": "internlm2", **sizes})
    save_pretrained(tmp_path, model, byte_tokenizer(), dtype=torch.float32)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw.items() >= ({"model_type": "internlm2", "vocab_size": 259, **sizes}).items()
    tensors = tensors_of(tmp_path)
    assert tensors["model.layers.0.attention.wqkv.weight"].shape == ((8 + 2 * 2) * 8, 64)
    ids = torch.arange(40)[None]
    full = {"tie_word_embeddings": False, "max_position_embeddings": 2048} | raw
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits.double(), logits(full, tensors, ids), rtol=0, atol=1e-4)


def test_files_of_internlm_1_may_hold_rotary_frequencies(tmp_path: Path) -> None:
    tensors = random_tensors(INTERNLM)
    frequencies = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(4)}
    write(tmp_path, INTERNLM, tensors | frequencies)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        found = build(model_name_or_path=str(tmp_path))(ids).logits
    torch.testing.assert_close(found.double(), logits(INTERNLM, tensors, ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model.layers.1.attention.wqkv.weight": None}, "missing: .*q_proj"),
        ({"model.layers.1.attention.wq.weight": torch.ones(64, 64)}, "unexpected: model.layers.1.attention.wq.weight"),
        ({"model.layers.1.attention.wqkv.weight": torch.ones(96, 64)}, "shape of "),
        ({"model.layers.1.attention.wqkv.weight": torch.ones(136, 64)}, "shape of "),
        ({"output.weight": torch.full((259, 64), float("nan"))}, "not finite: "),
    ],
)
def test_files_that_do_not_fit_are_refused(change: dict[str, Tensor | None], said: str, tmp_path: Path) -> None:
    tensors = {**random_tensors(INTERNLM2), **change}
    write(tmp_path, INTERNLM2, {name: value for name, value in tensors.items() if value is not None})
    with pytest.raises(ModelError, match=said):
        build(model_name_or_path=str(tmp_path))


def test_python_code_of_a_folder_is_not_run(tmp_path: Path) -> None:
    write(tmp_path, INTERNLM2, random_tensors(INTERNLM2))
    for name in ("modeling_internlm2.py", "configuration_internlm2.py"):
        (tmp_path / name).write_text("raise SystemExit('run')\n")
    assert isinstance(build(model_name_or_path=str(tmp_path)), LlamaForCausalLM)
