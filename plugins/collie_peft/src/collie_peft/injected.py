"""What the methods share that peft puts into a model layer by layer; peft does the work, in this rank's part of it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import peft
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from collie_core.api import AdapterConfig, ModelError, is_stage
from collie_peft.files import PREFIX, WEIGHTS, read_config, read_tensors, write_config

ALL_LINEAR = "all-linear"
NAME = "default"  # of the adapter in the model, as peft has it


class InjectedAdapter:
    """Puts peft's layers around those of a model; the model stays the object that it is."""

    config_class: ClassVar[type[Any]]  # of peft

    def attach(self, model: nn.Module, config: AdapterConfig) -> nn.Module:
        """Put the adapter around the target layers and freeze the rest.

        Raises:
            ModelError: a name of a module matches nothing, or peft refuses the combination.
        """
        options = config.model_dump(exclude={*config.for_the_core})
        for key in ("target_modules", "feedforward_modules", "modules_to_save"):
            if not is_stage(model):
                check_names(model, key, options.get(key))
        return self._inject(model, self.config_class(task_type=peft.TaskType.CAUSAL_LM, **options))

    def save(self, model: nn.Module, path: Path, state: Mapping[str, Tensor]) -> None:
        """Write adapter_model.safetensors and adapter_config.json, for `PeftModel.from_pretrained`."""
        config: Any = model.peft_config[NAME]  # type: ignore[index]
        save_file({_file_key(name): value for name, value in state.items()}, path / WEIGHTS, metadata={"format": "pt"})
        write_config(model, config, path)

    def load(self, model: nn.Module, path: Path) -> nn.Module:
        """Put on an adapter like the one in `path`.

        Raises:
            ModelError: its configuration cannot be read, or peft refuses it for this model.
        """
        return self._inject(model, read_config(path, self.config_class))

    def state(self, path: Path) -> Mapping[str, Tensor]:
        """The values of the adapter in `path` by the names that its parameters have in a model.

        Raises:
            ModelError: they are no safetensors, or torn.
        """
        tensors = read_tensors(path / WEIGHTS)
        saved = read_config(path, self.config_class).modules_to_save or ()
        return {_parameter_name(key, saved): value for key, value in tensors.items()}

    def merge(self, module: nn.Module) -> None:
        """Put the adapter of one of peft's layers into the weight below it.

        Raises:
            ModelError: the merged weight is not finite.
        """
        layer: Any = module
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise ModelError(f"the adapter cannot be merged: {error}") from error
        layer.merged_adapters.clear()  # the weight is taken away again; the module stays as it was

    def _inject(self, model: nn.Module, config: Any) -> nn.Module:
        if is_stage(model) and config.modules_to_save:
            names = [name for name, _ in model.named_modules()]
            config.modules_to_save = [end for end in config.modules_to_save if matches(end, names)] or None
        try:
            peft.inject_adapter_in_model(config, model, adapter_name=NAME)
        except (ValueError, TypeError) as error:
            raise ModelError(f"adapter: {error}") from error
        _require_low_ranks(model)
        return model


def _require_low_ranks(model: nn.Module) -> None:
    """A product of matrices has no higher rank than its sides are long. Layers that ranks share were looked at whole.

    Raises:
        ModelError: a layer has a higher rank.
    """
    for name, module in model.named_modules():
        rank = getattr(module, "r", {}).get(NAME, 0) if isinstance(module, LoraLayer) else 0
        if rank and not hasattr(module.get_base_layer(), "shares"):
            sides = module.in_features, module.out_features
            if rank > min(sides):
                raise ModelError(
                    f"adapter: rank {rank} is above the dimension of {name}, which has {sides[0]} inputs and "
                    f"{sides[1]} outputs; set it to at most {min(sides)}, or give this layer another (rank_pattern)"
                )


def _file_key(name: str) -> str:
    """A parameter's name in peft's files."""
    name = name.replace(f".modules_to_save.{NAME}.", ".").replace(f".lora_magnitude_vector.{NAME}.weight", "{}")
    name = name.replace("{}", ".lora_magnitude_vector").replace(f".{NAME}.", ".")
    return PREFIX + name.removesuffix(f".{NAME}")


def _parameter_name(key: str, modules_to_save: Any) -> str:
    """The other way round."""
    name = key.removeprefix(PREFIX)
    if name.endswith(".lora_magnitude_vector"):
        return f"{name}.{NAME}.weight"
    module, _, leaf = name.rpartition(".")
    if leaf.startswith(("ia3_l", "lora_")):  # a parameter by itself, and not the weight of a module
        return f"{name}.{NAME}"
    if ".lora_" in name:
        return f"{module}.{NAME}.{leaf}"
    if any(matches(end, [module]) for end in modules_to_save):
        return f"{module}.modules_to_save.{NAME}.{leaf}"
    return name  # a bias of the model itself


def matches(ending: str, names: list[str]) -> bool:
    """Whether one of the names is, or ends in, the given one."""
    return any(name == ending or name.endswith(f".{ending}") for name in names)


def check_names(model: nn.Module, key: str, wanted: list[str] | str | None) -> None:
    """peft complains only when no name at all matches; a single wrong one would train too little.

    Raises:
        ModelError: a name of `adapter.<key>` matches no module.
    """
    if wanted is None or wanted == ALL_LINEAR:
        return
    names = [name for name, _ in model.named_modules() if name]
    if isinstance(wanted, str):
        if not any(re.fullmatch(wanted, name) for name in names):
            raise ModelError(f"adapter.{key}={wanted!r} matches no module of the model as a whole name")
        return
    for ending in wanted:
        if not matches(ending, names):
            raise ModelError(f"adapter.{key}: the model has no module {ending!r}{_nearest(ending, names)}")


def _nearest(ending: str, names: list[str]) -> str:
    known = sorted({name.rsplit(".", 1)[-1] for name in names if not name.rsplit(".", 1)[-1].isdigit()})
    near = difflib.get_close_matches(ending, known, n=3)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return f"; it has {', '.join(known)}"
