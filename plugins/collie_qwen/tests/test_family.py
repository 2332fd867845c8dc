"""What the families add to what transformers says, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from collie_core.api import ModelError, Plugins
from collie_core.config.model import ModelConfig
from collie_core.data.tokenizer import byte_tokenizer
from collie_core.model.build import empty_model, new_model
from collie_core.model.export import save_pretrained
from collie_core.model.partition import plan

SMALL: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}


def family(name: str) -> Any:
    return Plugins.discover().load("model", name)


@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_moe"])
def test_ranks_share_the_inner_dimension_of_every_expert(name: str) -> None:
    config = family(name).make_config({"model_type": name, **SMALL})
    config.dtype = torch.float32
    placements = plan(empty_model(family(name), config), family(name), tensor_size=2).placements
    gates, down = (placements[f"model.layers.1.mlp.experts.{part}_proj"] for part in ("gate_up", "down"))
    assert gates.shape == (3, 48, 32)
    assert gates.rule is not None
    assert (gates.rule.dim, gates.rule.intervals(2, 1)) == (1, [(12, 24), (36, 48)])
    assert down.rule is not None
    assert (down.rule.dim, down.rule.intervals(2, 1)) == (2, [(12, 24)])
    assert placements["model.layers.1.mlp.gate.weight"].rule is None


def test_experts_are_read_and_saved_one_by_one(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **SMALL)).save_pretrained(source)
    section = ModelConfig(model_name_or_path=str(source))
    target.mkdir()
    model = new_model(section, Plugins.discover(), byte_tokenizer(), torch.float32)
    save_pretrained(target, model, byte_tokenizer(), dtype=torch.float32)
    before, after = load_file(source / "model.safetensors"), load_file(target / "model.safetensors")
    assert before["model.layers.1.mlp.experts.2.gate_proj.weight"].shape == (24, 32)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_moe"])
def test_a_loss_for_the_balance_of_experts_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match=f"{name}: output_router_logits=true asks for a loss"):
        family(name).make_config({"model_type": name, **SMALL, "output_router_logits": True})
