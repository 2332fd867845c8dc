"""From `model:` in the config to a model with its weights, strictly: what does not fit is an error by name."""

from __future__ import annotations

import json
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import nn

from collie_core.errors import ModelError
from collie_core.model.family import StockFamily, unknown_keys

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from collie_core.config.model import ModelConfig
    from collie_core.hookspecs import ModelFamily
    from collie_core.plugins import Plugins

INDEX = "model.safetensors.index.json"
ADAPTER = "collie_adapter.json"  # ours, beside what the adapter plugin writes
PEFT_ADAPTER = "adapter_config.json"


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision of forward and backward; `auto` is bfloat16 where the GPU has it, float32 on CPU."""
    if name != "auto":
        return cast(torch.dtype, getattr(torch, name))
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def architecture(
    section: ModelConfig, registry: Plugins, tokenizer: PreTrainedTokenizerBase
) -> tuple[ModelFamily, PretrainedConfig]:
    """The family plugin (or the stock family) and the transformers config of the run.

    A `model.config` without a vocabulary size takes the tokenizer's.

    Raises:
        ModelError: no readable config.json, an unknown family, or a key that the family does not have.
    """
    raw = dict(section.config) if section.config is not None else _read_config(section)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise ModelError(f"{_source(section)} names no model_type, so its family is unknown")
    family = _family(model_type, registry)
    if section.config is not None:
        raw.setdefault("vocab_size", len(tokenizer))
        for role in ("bos_token_id", "eos_token_id", "pad_token_id"):
            raw.setdefault(role, getattr(tokenizer, role))
    config = family.make_config(raw)
    if section.config is not None:
        _refuse_unknown_keys(config, raw)
    if len(tokenizer) > config.vocab_size:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens but the model's vocabulary only {config.vocab_size}; "
            "use the tokenizer that belongs to the model"
        )
    return family, config


def check_length(config: PretrainedConfig, max_length: int) -> None:
    """Refuse positions the model was never built for.

    Raises:
        ModelError: `max_length` exceeds `max_position_embeddings`.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int) and max_length > limit:
        raise ModelError(
            f"data.max_length={max_length} exceeds the model's max_position_embeddings={limit}; "
            f"set data.max_length to at most {limit}"
        )


def build_model(target: ModelFamily, config: PretrainedConfig, weights: str | None) -> PreTrainedModel:
    """The whole model in `config.dtype` on the CPU, with `weights` of a folder or hub id, or random ones.

    Random weights are a function of torch's random state alone.

    Raises:
        ModelError: a missing, unexpected, misshapen or non-finite weight, or a file that is not safetensors.
    """
    from transformers import AutoModelForCausalLM

    if weights is None:
        return cast("PreTrainedModel", AutoModelForCausalLM.from_config(config, dtype=config.dtype))
    _check_index(Path(weights))
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            weights,
            config=config,
            dtype=config.dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # collected in the report and refused below, all at once
            output_loading_info=True,
        )
    except Exception as error:
        raise ModelError(f"cannot load the weights of {weights}: {' '.join(str(error).split())}") from error
    model, report = loaded  # as `output_loading_info` has it
    problems = _loading_problems(report)
    problems += [f"not finite: {name}" for name, value in model.named_parameters() if not value.isfinite().all()]
    if problems:
        raise ModelError(f"the weights of {weights} do not fit {target.model_type}: " + "; ".join(problems))
    return cast("PreTrainedModel", model)


def load_pretrained(
    section: ModelConfig, registry: Plugins, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
) -> nn.Module:
    """The model of a folder or hub id; of an adapter's folder, the base model it names with the adapter on it.

    Raises:
        ModelError: see `architecture` and `build_model`.
    """
    folder = Path(str(section.model_name_or_path))
    saved = _saved_adapter(folder)
    if saved is None:
        return new_model(section, registry, tokenizer, dtype)
    model = new_model(section.model_copy(update={"model_name_or_path": saved.base}), registry, tokenizer, dtype)
    return cast(nn.Module, registry.load("adapter", saved.type).load(model, folder))


class SavedAdapter(NamedTuple):
    """What an adapter's folder says of itself."""

    type: str  # the plugin's name
    base: str  # folder or hub id of the model it sits on


def describe_adapter(folder: Path, type: str, base: str) -> None:
    """Write down which plugin reads the adapter in `folder`, and its base model (a local one by its full path)."""
    base = str(Path(base).resolve()) if Path(base).exists() else base
    (folder / ADAPTER).write_text(json.dumps({"type": type, "base": base}, indent=2) + "\n")


def _saved_adapter(folder: Path) -> SavedAdapter | None:
    """The adapter in a folder that CoLLiE or peft wrote; None when it holds none."""
    if (folder / ADAPTER).is_file():
        return SavedAdapter(**json.loads((folder / ADAPTER).read_text()))
    if (folder / PEFT_ADAPTER).is_file():
        found = json.loads((folder / PEFT_ADAPTER).read_text())
        return SavedAdapter(found["peft_type"].lower(), found["base_model_name_or_path"])
    return None


def new_model(
    section: ModelConfig, registry: Plugins, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
) -> PreTrainedModel:
    """The model that `model:` describes, on the CPU in `dtype`."""
    family, config = architecture(section, registry, tokenizer)
    config.dtype = dtype
    config._attn_implementation = section.attn_implementation
    weights = section.model_name_or_path
    return cast("PreTrainedModel", registry.build_target("model", family, config=config, weights=weights))


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """All and trainable parameters, shared ones counted once."""
    return (
        sum(parameter.numel() for parameter in model.parameters()),
        sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
    )


def _family(model_type: str, registry: Plugins) -> ModelFamily:
    names = registry.names("model")
    plain = model_type.replace("_", "-").lower()
    return cast("ModelFamily", registry.load("model", plain) if plain in names else StockFamily(model_type))


def _source(section: ModelConfig) -> str:
    return "model.config" if section.config is not None else str(section.model_name_or_path)


def _read_config(section: ModelConfig) -> dict[str, Any]:
    from transformers import PretrainedConfig

    name = str(section.model_name_or_path)
    try:
        raw, _ = PretrainedConfig.get_config_dict(name)
    except (OSError, ValueError) as error:
        raise ModelError(f"model.model_name_or_path={name}: {_first_sentence(error)}") from error
    if not raw:
        raise ModelError(f"model.model_name_or_path={name}: no config.json there")
    return raw


def _first_sentence(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]


def _refuse_unknown_keys(config: PretrainedConfig, raw: dict[str, Any]) -> None:
    # A key that the class does not declare but that is gone from the instance was understood (rope_theta).
    ignored = [key for key in unknown_keys(config, list(raw)) if hasattr(config, key)]
    if not ignored:
        return
    known = [name for name in vars(config) if not name.startswith("_") and name not in ignored]
    near = [f"{key} (did you mean {match[0]}?)" if (match := get_close_matches(key, known)) else key for key in ignored]
    raise ModelError(f"model.config: the {config.model_type} family has no {', '.join(near)}")


def _check_index(folder: Path) -> None:
    """An index may only name files of its own folder: transformers would follow any path."""
    index = folder / INDEX
    if not index.is_file():
        return
    for name in set(json.loads(index.read_text()).get("weight_map", {}).values()):
        if Path(name).name != name:
            raise ModelError(f"{index} points outside its folder: {name!r}")


def _loading_problems(loaded: dict[str, Iterable[Any]]) -> list[str]:
    problems = []
    for label, key in (("missing", "missing_keys"), ("unexpected", "unexpected_keys")):
        if names := sorted(loaded[key]):
            problems.append(f"{label}: {_shorten(names)}")
    for name, found, expected in sorted(loaded["mismatched_keys"]):
        problems.append(f"shape of {name}: {list(found)} in the file, {list(expected)} in the model")
    return problems


def _shorten(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
