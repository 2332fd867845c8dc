"""LoRA: peft does the work, this file gives it a config and names what is wrong."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import TYPE_CHECKING

import peft
from torch import nn

from collie_core.api import ModelError

if TYPE_CHECKING:
    from collie_peft.lora_config import LoraConfig

ALL_LINEAR = "all-linear"


class LoraAdapter:
    """Puts LoRA onto a transformers model."""

    def attach(self, model: nn.Module, config: LoraConfig) -> peft.PeftModel:
        """Insert A and B beside the target layers and freeze the rest.

        Raises:
            ModelError: a name in `target_modules` or `modules_to_save` matches nothing, or peft refuses the
                combination.
        """
        _check_names(model, "target_modules", config.target_modules)
        _check_names(model, "modules_to_save", config.modules_to_save)
        options = config.model_dump(exclude={"type"})
        try:
            return peft.get_peft_model(model, peft.LoraConfig(task_type=peft.TaskType.CAUSAL_LM, **options))
        except (ValueError, TypeError) as error:
            raise ModelError(f"adapter: {error}") from error

    def save(self, model: nn.Module, path: Path) -> None:
        """Write adapter_model.safetensors and adapter_config.json, for `PeftModel.from_pretrained`."""
        assert isinstance(model, peft.PeftModel)
        model.save_pretrained(str(path), safe_serialization=True)

    def load(self, model: nn.Module, path: Path) -> peft.PeftModel:
        """Put the adapter in `path` onto its base model, not trainable.

        Raises:
            ModelError: it does not fit the model, or its weights are no safetensors.
        """
        if not (path / "adapter_model.safetensors").is_file():
            raise ModelError(f"{path} holds no adapter_model.safetensors")
        try:
            return peft.PeftModel.from_pretrained(model, str(path))
        except (ValueError, RuntimeError, KeyError) as error:
            raise ModelError(f"the adapter in {path} does not fit: {str(error).strip().splitlines()[0]}") from error


def _check_names(model: nn.Module, key: str, wanted: list[str] | str | None) -> None:
    """peft complains only when no name at all matches; a single wrong one would train too little."""
    if wanted is None or wanted == ALL_LINEAR:
        return
    names = [name for name, _ in model.named_modules() if name]
    if isinstance(wanted, str):
        if not any(re.fullmatch(wanted, name) for name in names):
            raise ModelError(f"adapter.{key}={wanted!r} matches no module of the model as a whole name")
        return
    for ending in wanted:
        if not any(name == ending or name.endswith(f".{ending}") for name in names):
            raise ModelError(f"adapter.{key}: the model has no module {ending!r}{_nearest(ending, names)}")


def _nearest(ending: str, names: list[str]) -> str:
    known = sorted({name.rsplit(".", 1)[-1] for name in names if not name.rsplit(".", 1)[-1].isdigit()})
    near = difflib.get_close_matches(ending, known, n=3)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return f"; it has {', '.join(known)}"
