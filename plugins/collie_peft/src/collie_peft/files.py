"""peft's two files of an adapter: its weights and its configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from collie_core.api import ModelError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."  # of parameters' names in the weights


def read_config(path: Path, kind: type[Any]) -> Any:
    """peft's configuration in a folder, to go on training with.

    Raises:
        ModelError: it cannot be read, or is not of this kind.
    """
    try:
        config = peft.PeftConfig.from_pretrained(str(path))
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise ModelError(f"{path / CONFIG} cannot be read: {str(error).strip().splitlines()[0]}") from error
    if not isinstance(config, kind):
        raise ModelError(f"{path / CONFIG} cannot be read: it describes no {kind.__name__} of peft")
    config.inference_mode = False
    return config


def write_config(model: Any, config: Any, path: Path) -> None:
    """Write peft's configuration, as of an adapter that is used."""
    config.base_model_name_or_path = str(getattr(model.config, "name_or_path", "") or "") or None
    before, config.inference_mode = config.inference_mode, True
    config.save_pretrained(str(path))
    config.inference_mode = before


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file.

    Raises:
        ModelError: it is not there, no safetensors, or torn.
    """
    if not file.is_file():
        raise ModelError(f"{file.parent} holds no {file.name}")
    try:
        return dict(load_file(file))
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error
