"""The layers of a model: how many each pipeline stage has, and whether they are all alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from collie_core.model.build import architecture, empty_model
from collie_core.model.partition import plan

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from collie_core.config.run import RunConfig


@dataclass(frozen=True)
class Layers:
    """Of a model as a run cuts it."""

    of_stage: tuple[int, ...]
    parameters: int  # of one layer, on all tensor-parallel ranks together


def layers_of(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Layers | None:
    """None: they are not alike, or their number cannot be changed, so that a few do not stand for all.

    Raises:
        ModelError: the model cannot be, or not be cut so.
    """
    parallel = config.parallel
    family, stock = architecture(config.model, config.registry, tokenizer)
    model = empty_model(family, stock)
    cut = plan(
        model,
        family,
        tensor_size=parallel.tensor_parallel_size,
        pipeline_size=parallel.pipeline_parallel_size,
        cuts=parallel.pipeline_cuts,
    )
    if not cut.layers:
        return None
    layers = list(getattr(model.base_model, cut.layers))
    if getattr(stock, "num_hidden_layers", None) != len(layers) or not _alike(stock, layers):
        return None
    parameters = sum(parameter.numel() for parameter in layers[0].parameters())
    return Layers(tuple(len(cut.owned_layers(stage)) for stage in range(cut.pipeline_size)), parameters)


def set_layers(config: PretrainedConfig, number: int) -> None:
    """Make it the config of a model with so many layers, of those that are alike."""
    settings: Any = config
    for name, value in _by_layer(settings):
        setattr(settings, name, value[:number])
    settings.num_hidden_layers = number


def _by_layer(config: Any) -> list[tuple[str, list[Any]]]:
    """Attributes that have a value for each layer."""
    number = config.num_hidden_layers
    return [(name, value) for name, value in vars(config).items() if isinstance(value, list) and len(value) == number]


def _alike(config: PretrainedConfig, layers: list[nn.Module]) -> bool:
    lists = [value for _, value in _by_layer(config)]
    return all(value == value[:1] * len(value) for value in lists) and len({_looks(layer) for layer in layers}) == 1


def _looks(layer: nn.Module) -> str:
    """Its modules with what they were told, but for the number of the layer, and its parameters."""
    told = [
        (name, type(module).__name__, [(key, value) for key, value in vars(module).items() if _plain(key, value)])
        for name, module in layer.named_modules()
    ]
    return repr((told, [(name, tuple(value.shape)) for name, value in layer.named_parameters()]))


def _plain(key: str, value: object) -> bool:
    return key not in ("layer_idx", "layer_id", "layer_number") and isinstance(value, int | float | str | type(None))
