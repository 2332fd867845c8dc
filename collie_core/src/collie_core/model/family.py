"""What a model family declares: its stock classes, and only what they do not say themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from collie_core.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Rows = Callable[["PretrainedConfig"], Sequence[tuple[int, int]]]
"""The rows [begin, end) of a checkpoint tensor, in the order in which they stand in the model's tensor."""

Stub = Literal["identity", "tuple", "zero"]
"""What takes the place of a module on the stages that do not own it: its first argument unchanged, the same as a
1-tuple, or a zero that may be added to anything."""


@dataclass(frozen=True)
class Source:
    """Where the values of a model's tensor lie in the files.

    `*` in `key` stands for the number of the layer. Without `rows` the tensor is the whole of it.
    """

    key: str
    rows: Rows | None = None


@dataclass(frozen=True)
class StockFamily:
    """A family whose mathematics transformers has; every declaration beyond the name is optional.

    Names of modules and parameters are those of the stock model; `*` in them stands for a layer's number.
    """

    model_type: str
    """The `model_type` of its config.json."""

    stock_type: str = ""
    """The `model_type` of the transformers classes to use; empty: the same."""

    architecture: str = ""
    """The name under which other tools know the model of such a config.json; empty: the stock class."""

    translate: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict
    """Its config.json in the words of the stock config."""

    tensor_plan: Mapping[str, str] = field(default_factory=dict)
    """Module -> tensor-parallel style, over what transformers declares. An empty style takes one back."""

    pipeline_plan: Sequence[str] = ()
    """Children of the base model in the order of the forward pass; empty: what transformers declares, or derived."""

    stubs: Mapping[str, Stub] = field(default_factory=dict)
    """Child of the base model -> what replaces it on other stages; "identity" unless said."""

    later_stages: Mapping[str, Any] = field(default_factory=dict)
    """Config attributes that hold on every stage but the first, such as a scale that the first one applied."""

    divided: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Module -> attributes that count heads or widths and are divided by the tensor-parallel size."""

    kv_modules: Sequence[str] = ("k_proj", "v_proj")
    """Last names of the modules whose outputs are key and value heads."""

    weights: Mapping[str, Source] = field(default_factory=dict)
    """Parameter -> its source, for files that are laid out differently; read and written back."""

    computed: Sequence[str] = ()
    """Names in the files of what the model computes by itself, such as masks; neither read nor written."""

    def make_config(self, raw: Mapping[str, Any]) -> PretrainedConfig:
        """The transformers config for a raw config.json or `model.config`.

        Raises:
            ModelError: the family is unknown to transformers, a value is refused by its config class, or the router of
                experts is to be trained by a loss of its own.
        """
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig

        # A copy, since transformers completes nested mappings in place.
        options = {key: value for key, value in self.translate(deepcopy(dict(raw))).items() if key != "model_type"}
        try:
            config = AutoConfig.for_model(self.stock_type or self.model_type, **options)
        except (ValueError, TypeError, StrictDataclassError) as error:
            raise ModelError(f"model.config: {_one_line(error)}") from error
        if getattr(config, "output_router_logits", False):
            raise ModelError(
                f"{self.model_type}: output_router_logits=true asks for a loss that balances experts, which depends "
                "on how a batch is cut and is not supported; set output_router_logits=false"
            )
        return config

    def write_config(self, config: PretrainedConfig, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The config.json of an export: of a stock family the stock one, else `raw`, as the family has it."""
        if not self.stock_type:
            return config.to_diff_dict()
        written = {key: value for key, value in raw.items() if key not in ("dtype", "torch_dtype")}
        if self.architecture:
            written.setdefault("architectures", [self.architecture])
        return written | {"model_type": self.model_type, "torch_dtype": str(config.dtype).removeprefix("torch.")}


def unknown_keys(config: PretrainedConfig, keys: list[str]) -> list[str]:
    """Those of `keys` that the config class does not declare (transformers itself keeps them silently)."""
    known = {item.name for item in fields(config)} | set(config.attribute_map) | {"model_type"}
    return [key for key in keys if key not in known]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
