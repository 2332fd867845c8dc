"""LLaMA-Adapter through peft: prompts in the attention of the last layers, behind a gate (arXiv 2303.16199).

peft's model for it finds layers by counting those that it sees, which on a pipeline stage are not all; so its attention
modules are put in here, each into the layer of the number that it has in the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import peft
from peft.tuners.adaption_prompt.config import TRANSFORMERS_MODEL_CONFIG, prepare_config
from peft.tuners.adaption_prompt.layer import AdaptedAttention, AdaptedAttentionGPT
from safetensors.torch import save_file
from torch import Tensor, nn

from collie_core.api import AdapterConfig, ModelError
from collie_peft.files import PREFIX, WEIGHTS, read_config, read_tensors, write_config


class LlamaAdapter:
    """Puts peft's adapted attention around that of the last layers."""

    def attach(self, model: nn.Module, config: AdapterConfig) -> nn.Module:
        """Wrap the attention of the last layers and freeze the rest.

        Raises:
            ModelError: peft does not know the family, or there are fewer layers, or no such attention.
        """
        options = config.model_dump(exclude={*config.for_the_core})
        return self._put_on(model, peft.AdaptionPromptConfig(task_type=peft.TaskType.CAUSAL_LM, **options))

    def save(self, model: Any, path: Path, state: Mapping[str, Tensor]) -> None:
        """Write adapter_model.safetensors and adapter_config.json, for `PeftModel.from_pretrained`."""
        save_file({PREFIX + name: value for name, value in state.items()}, path / WEIGHTS, metadata={"format": "pt"})
        write_config(model, model.collie_peft_config, path)

    def load(self, model: nn.Module, path: Path) -> nn.Module:
        """Put on an adapter like the one in `path`.

        Raises:
            ModelError: its configuration cannot be read, or does not fit the model.
        """
        return self._put_on(model, read_config(path, peft.AdaptionPromptConfig))

    def state(self, path: Path) -> Mapping[str, Tensor]:
        """The saved values.

        Raises:
            ModelError: they cannot be read.
        """
        return {name.removeprefix(PREFIX): value for name, value in read_tensors(path / WEIGHTS).items()}

    def _put_on(self, model: Any, config: Any) -> nn.Module:
        kind, count = model.config.model_type, model.config.num_hidden_layers
        if kind not in TRANSFORMERS_MODEL_CONFIG:
            raise ModelError(f"adapter: llama_adapter knows {', '.join(TRANSFORMERS_MODEL_CONFIG)}, not {kind}")
        if config.adapter_layers > count:
            raise ModelError(f"adapter.adapter_layers={config.adapter_layers}, but the model has {count} layers")
        config = prepare_config(config, model)
        model.requires_grad_(False)
        wrapper = AdaptedAttentionGPT if kind == "gpt2" else AdaptedAttention
        for number, layer in enumerate(_layers(model)):
            # a layer of another stage is missing here
            if layer is not None and number >= count - config.adapter_layers:
                attention = getattr(layer, config.target_modules, None)
                if attention is None:
                    raise ModelError(f"adapter.target_modules: a layer has no {config.target_modules!r}")
                setattr(layer, config.target_modules, wrapper(kind, config.adapter_len, attention))
        model.collie_peft_config = config
        return cast(nn.Module, model)


def _layers(model: Any) -> list[nn.Module | None]:
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len)._modules.values())
