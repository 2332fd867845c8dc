"""Bottleneck adapters on a tiny random llama: the equation, what is trained, what is written and refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from collie_core.api import ModelError, ParallelConfig
from collie_peft.bottleneck import Bottleneck, BottleneckAdapter
from collie_peft.bottleneck_config import BottleneckConfig


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))


def attach(**options: Any) -> Any:
    return BottleneckAdapter().attach(tiny(), BottleneckConfig.model_validate({"type": "bottleneck", **options}))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(8)[None]).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize(("placement", "places"), [("houlsby", {"o_proj", "down_proj"}), ("pfeiffer", {"down_proj"})])
def test_only_bottlenecks_are_trained_and_the_model_starts_as_it_was(placement: str, places: set[str]) -> None:
    model = attach(placement=placement, reduction_factor=4)
    found = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, Bottleneck)}
    assert found == places
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".down." in name or ".up." in name), name
    assert torch.equal(logits(model), logits(tiny()))


@pytest.mark.parametrize("function", ["relu", "gelu", "silu"])
def test_the_equation(function: str) -> None:
    base = nn.Linear(3, 8)
    layer = Bottleneck(base, 8, 2, function)
    nn.init.normal_(layer.up.weight)
    nn.init.normal_(layer.up.bias)
    x = torch.randn(4, 3)
    y = x @ base.weight.T + base.bias
    hidden = getattr(torch.nn.functional, function)(y @ layer.down.weight.T + layer.down.bias)
    torch.testing.assert_close(layer(x), y + hidden @ layer.up.weight.T + layer.up.bias)


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = attach(placement="pfeiffer", reduction_factor=4, non_linearity="gelu")
    state = {name: value for name, value in model.named_parameters() if value.requires_grad}
    with torch.no_grad():
        for value in state.values():
            value.add_(0.1 * torch.randn_like(value))
    adapter = BottleneckAdapter()
    adapter.save(model, tmp_path, {name: value.detach() for name, value in state.items()})
    loaded = adapter.load(tiny(), tmp_path)
    loaded.load_state_dict(dict(adapter.state(tmp_path)), strict=False)
    assert torch.equal(logits(loaded), logits(model))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors cannot be read"):
        adapter.state(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"adapter_config\.json cannot be read"):
        adapter.load(tiny(), tmp_path)


def test_what_is_refused() -> None:
    with pytest.raises(ModelError, match=r"target_modules: the model has no module 'dwn_proj'; did you mean"):
        attach(target_modules=["dwn_proj"])
    with pytest.raises(ModelError, match=r"self_attn is a LlamaAttention, no linear layer"):
        attach(target_modules=["self_attn"])
    with pytest.raises(ValidationError):
        BottleneckConfig.model_validate({"type": "bottleneck", "r": 8})
    config = BottleneckConfig(target_modules=["q_proj"])
    sharded = SimpleNamespace(parallel=ParallelConfig(tensor_parallel_size=2))
    staged = SimpleNamespace(parallel=ParallelConfig(pipeline_parallel_size=2))
    assert "leave target_modules out" in config.refused(sharded)  # type: ignore[arg-type]
    assert not config.refused(staged)  # type: ignore[arg-type]
    assert not BottleneckConfig().refused(sharded)  # type: ignore[arg-type]
