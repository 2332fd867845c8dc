"""LoRA on a tiny random llama: what is trained, what is written, what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pydantic import ValidationError
from transformers import LlamaConfig, LlamaForCausalLM

from collie_core.api import Adapter, Component, ConfigError, ModelError, RunConfig
from collie_peft import LORA
from collie_peft.lora import LoraAdapter
from collie_peft.lora_config import LoraConfig

LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )


def attach(**options: Any) -> Any:
    return LoraAdapter().attach(tiny(), LoraConfig.model_validate({"type": "lora", **options}))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(8)[None]).logits  # type: ignore[no-any-return]


def save(model: Any, path: Path) -> None:
    path.mkdir(exist_ok=True)
    state = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    LoraAdapter().save(model, path, state)


def adapted(model: Any) -> set[str]:
    return {name.split(".lora_A")[0].rsplit(".", 1)[-1] for name, _ in model.named_parameters() if "lora_A" in name}


def train(model: Any, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.arange(8)[None]
    for _ in range(steps):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()


def test_component_is_light_and_points_at_the_adapter() -> None:
    assert isinstance(LORA, Component)
    assert LORA.build == "collie_peft.lora:LoraAdapter"
    assert LORA.config == "collie_peft.lora_config:LoraConfig"
    imports = "import sys, collie_peft, collie_peft.lora_config"
    code = f"{imports}; sys.exit(bool({{'torch', 'peft'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_fields_have_the_names_and_defaults_of_peft() -> None:
    theirs = {field.name: field for field in fields(peft.LoraConfig)}
    for name, field in LoraConfig.model_fields.items():
        if name in LoraConfig.for_the_core:
            continue
        factory, default = theirs[name].default_factory, theirs[name].default
        assert field.default == (default if factory is MISSING else factory())


def test_adapter_obeys_its_contract() -> None:
    adapter: Adapter = LoraAdapter()
    assert adapter.attach(tiny(), LoraConfig()) is not None


def test_only_the_adapter_is_trained_and_it_starts_at_zero() -> None:
    model = attach(target_modules=["q_proj", "v_proj"], r=4)
    assert adapted(model) == {"q_proj", "v_proj"}
    assert all(("lora_" in name) == p.requires_grad for name, p in model.named_parameters())
    assert torch.equal(logits(model), logits(tiny()))
    assert model.peft_config["default"].task_type == "CAUSAL_LM"


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", LINEAR),
        (None, {"q_proj", "v_proj"}),
        (r".*\.layers\.1\.mlp\.(up|down)_proj", {"up_proj", "down_proj"}),
        (["self_attn.k_proj"], {"k_proj"}),
    ],
)
def test_targets(targets: Any, expected: set[str]) -> None:
    assert adapted(attach(target_modules=targets)) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"bias": "lora_only"},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": False},
        {"exclude_modules": ["down_proj"]},
        {"modules_to_save": ["lm_head"]},
        {"layers_to_transform": [1], "target_modules": ["q_proj", "down_proj"]},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 4}},
        {"lora_dropout": 0.5},
    ],
)
def test_saved_adapter_loads_onto_the_plain_model(tmp_path: Path, options: dict[str, Any]) -> None:
    model = attach(**({"target_modules": "all-linear", "r": 4} | options))
    train(model)
    model.eval()
    save(model, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (written["peft_type"], written["task_type"], written["r"]) == ("LORA", "CAUSAL_LM", 4)
    loaded = peft.PeftModel.from_pretrained(tiny(), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)
    assert not torch.equal(logits(loaded), logits(tiny()))


def test_rank_pattern_reaches_its_layers() -> None:
    model = attach(target_modules=["q_proj", "v_proj"], r=4, rank_pattern={"q_proj": 2})
    ranks = {name.split(".")[-4]: p.shape[0] for name, p in model.named_parameters() if "lora_A" in name}
    assert ranks == {"q_proj": 2, "v_proj": 4}


def test_an_unknown_module_gives_near_names() -> None:
    with pytest.raises(ModelError, match=r"target_modules: the model has no module 'q_prj'; did you mean q_proj"):
        attach(target_modules=["v_proj", "q_prj"])
    with pytest.raises(ModelError, match=r"modules_to_save.*'head'.*lm_head"):
        attach(target_modules=["v_proj"], modules_to_save=["head"])
    with pytest.raises(ModelError, match=r"no module 'zzz'; it has .*down_proj"):
        attach(target_modules=["zzz"])
    with pytest.raises(ModelError, match=r"'q_proj' matches no module"):
        attach(target_modules="q_proj")


def test_what_peft_refuses_is_an_error_of_the_adapter() -> None:
    with pytest.raises(ModelError, match="adapter: "):
        attach(target_modules=["embed_tokens", "norm"])


def test_a_rank_above_the_dimension_is_refused() -> None:
    with pytest.raises(ModelError, match=r"rank 33 is above the dimension of .*q_proj, which has \d+ inputs"):
        attach(target_modules=["q_proj"], r=33)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("r", True),
        ("lora_alpha", -1),
        ("lora_dropout", 1.0),
        ("bias", "some"),
        ("rank_pattern", {"q_proj": 0}),
        ("lora_r", 8),
        ("init_lora_weights", "zeros"),
    ],
)
def test_wrong_values_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValidationError) as caught:
        LoraConfig.model_validate({"type": "lora", field: value})
    assert {error["loc"][0] for error in caught.value.errors()} == {field}


def test_load_puts_a_saved_adapter_back_and_refuses_torn_files(tmp_path: Path) -> None:
    model = attach(target_modules=["q_proj", "v_proj"])
    train(model)
    save(model, tmp_path)
    loaded = LoraAdapter().load(tiny(), tmp_path)
    state = LoraAdapter().state(tmp_path)
    assert state.keys() == {name for name, value in loaded.named_parameters() if value.requires_grad}
    loaded.load_state_dict(dict(state), strict=False)
    torch.testing.assert_close(logits(loaded.eval()), logits(model.eval()))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors cannot be read"):
        LoraAdapter().state(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors"):
        LoraAdapter().state(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"adapter_config\.json cannot be read"):
        LoraAdapter().load(tiny(), tmp_path)


def test_an_adapter_on_random_weights_is_refused() -> None:
    with pytest.raises(ConfigError, match="saved without its base model"):
        RunConfig(
            model={"config": {"model_type": "llama"}}, tokenizer="byte", adapter={"type": "lora"}, data={"train": "t"}
        )
