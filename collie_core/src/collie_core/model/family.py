"""A model family that transformers already contains needs to say nothing but its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from collie_core.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class StockFamily:
    """A family whose architecture is `transformers`' own class for `model_type`."""

    model_type: str

    def make_config(self, raw: Mapping[str, Any]) -> PretrainedConfig:
        """The transformers config for a raw config.json or `model.config`.

        Raises:
            ModelError: the family is unknown to transformers, or a value is refused by its config class.
        """
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig

        options = {key: value for key, value in raw.items() if key != "model_type"}
        try:
            return AutoConfig.for_model(self.model_type, **options)
        except (ValueError, TypeError, StrictDataclassError) as error:
            raise ModelError(f"model.config: {_first_line(error)}") from error


def unknown_keys(config: PretrainedConfig, keys: list[str]) -> list[str]:
    """Those of `keys` that the config class does not declare (transformers itself keeps them silently)."""
    known = {item.name for item in fields(config)} | set(config.attribute_map) | {"model_type"}
    return [key for key in keys if key not in known]


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())
