"""LoRA through peft, which is right, and what is wrong in one way each."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
from safetensors.torch import load_file
from torch import Tensor, nn

from collie_core.api import is_stage


class LowRanks:
    """Around every linear layer but the head."""

    options: Mapping[str, Any] = {"r": 4, "lora_alpha": 8}

    def attach(self, model: nn.Module, config: Any) -> nn.Module:
        options = {"target_modules": "all-linear", **self.options}
        return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))

    def save(self, model: nn.Module, path: Path, state: Mapping[str, Tensor]) -> None:
        model.save_pretrained(str(path), state_dict=dict(state))  # type: ignore[operator]

    def load(self, model: nn.Module, path: Path) -> nn.Module:
        return self.attach(model, None)

    def state(self, path: Path) -> Mapping[str, Tensor]:
        saved = load_file(path / "adapter_model.safetensors")
        return {key.replace(".weight", ".default.weight"): value for key, value in saved.items()}


class TrainsTheBase(LowRanks):
    def attach(self, model: nn.Module, config: Any) -> nn.Module:
        found = super().attach(model, config)
        for name, parameter in found.named_parameters():
            if name.endswith("embed_tokens.weight"):
                parameter.requires_grad = True
        return found


class LoudStart(LowRanks):
    options: Mapping[str, Any] = {**LowRanks.options, "init_lora_weights": False}


class SavesCoarsely(LowRanks):
    def state(self, path: Path) -> Mapping[str, Tensor]:
        return {key: value.bfloat16().float() for key, value in super().state(path).items()}


class MergesHalf(LowRanks):
    def merge(self, module: nn.Module) -> None:
        layer: Any = module
        layer.base_layer.weight.data += 0.5 * layer.get_delta_weight("default")


class SharedByAll(LowRanks):
    """Reads a file once, and whatever is asked for later is that."""

    known: Mapping[str, Tensor] | None = None

    def state(self, path: Path) -> Mapping[str, Tensor]:
        self.known = self.known or super().state(path)
        return self.known


class TidiesFiles(LowRanks):
    """Writes the folder anew that it is to read."""

    def load(self, model: nn.Module, path: Path) -> nn.Module:
        for file in path.glob("adapter_config.json"):
            file.write_text(json.dumps(json.loads(file.read_text())))
        return super().load(model, path)

    def merge(self, module: nn.Module) -> None:
        layer: Any = module
        layer.base_layer.weight.data += layer.get_delta_weight("default")


class MainRankOnly(LowRanks):
    """The others have another factor."""

    @property
    def options(self) -> Mapping[str, Any]:  # type: ignore[override]
        return {"r": 4, "lora_alpha": 8 if os.environ.get("RANK", "0") == "0" else 1}


class OtherOnStages(LowRanks):
    """On a pipeline stage its layers have another factor."""

    def attach(self, model: nn.Module, config: Any) -> nn.Module:
        options = {**self.options, "lora_alpha": 1 if is_stage(model) else 8, "target_modules": "all-linear"}
        return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))


class LlamasOnly(LowRanks):
    def attach(self, model: nn.Module, config: Any) -> nn.Module:
        assert model.config.model_type == "llama"  # type: ignore[union-attr]
        return super().attach(model, config)
