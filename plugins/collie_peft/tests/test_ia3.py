"""(IA)^3 on a tiny random llama: peft's names and defaults, what is trained, what is written."""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pydantic import ValidationError
from transformers import LlamaConfig, LlamaForCausalLM

from collie_core.api import ModelError, ShardedAdapter
from collie_peft.ia3 import Ia3Adapter
from collie_peft.ia3_config import Ia3Config


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))


def attach(**options: Any) -> Any:
    return Ia3Adapter().attach(tiny(), Ia3Config.model_validate({"type": "ia3", **options}))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(8)[None]).logits  # type: ignore[no-any-return]


def test_fields_have_the_names_and_defaults_of_peft() -> None:
    theirs = {field.name: field for field in fields(peft.IA3Config)}
    for name, field in Ia3Config.model_fields.items():
        if name not in Ia3Config.for_the_core:
            factory, default = theirs[name].default_factory, theirs[name].default
            assert field.default == (default if factory is MISSING else factory())


def test_only_the_vectors_are_trained_and_the_model_starts_as_it_was() -> None:
    model = attach()
    assert all(("ia3_l" in name) == p.requires_grad for name, p in model.named_parameters())
    assert torch.equal(logits(model), logits(tiny()))


@pytest.mark.parametrize(
    "options",
    [{}, {"target_modules": ["q_proj", "up_proj"], "feedforward_modules": ["up_proj"], "modules_to_save": ["lm_head"]}],
)
def test_saved_adapter_loads_in_peft_and_back(tmp_path: Path, options: dict[str, Any]) -> None:
    model = attach(**options)
    state = {name: value for name, value in model.named_parameters() if value.requires_grad}
    with torch.no_grad():
        for value in state.values():
            value.add_(0.1 * torch.randn_like(value))
    Ia3Adapter().save(model, tmp_path, {name: value.detach() for name, value in state.items()})
    loaded = peft.PeftModel.from_pretrained(tiny(), str(tmp_path))
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)
    read = Ia3Adapter().state(tmp_path)
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], value) for name, value in state.items())


def test_vectors_lie_along_outputs_or_inputs() -> None:
    adapter = Ia3Adapter()
    assert isinstance(adapter, ShardedAdapter)
    found = {
        name.split(".")[-3]: adapter.cut(name, tuple(v.shape))
        for name, v in attach().named_parameters()
        if "ia3" in name
    }
    assert found == {"k_proj": (0, "outputs"), "v_proj": (0, "outputs"), "down_proj": (1, "inputs")}
    assert adapter.cut("lm_head.modules_to_save.default.weight", (32, 16)) is None


def test_wrong_names_and_values_are_refused() -> None:
    with pytest.raises(ModelError, match=r"feedforward_modules: the model has no module 'dwn_proj'; did you mean"):
        attach(target_modules=["down_proj"], feedforward_modules=["dwn_proj"])
    with pytest.raises(ValidationError):
        Ia3Config.model_validate({"type": "ia3", "r": 8})
