"""The layers of a model: how many each pipeline stage has, whether they are all alike, and how few stand for all."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from collie_core.model.build import architecture, empty_model
from collie_core.model.partition import plan

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from collie_core.config.run import RunConfig


LIVE = 10**9  # parameters; DeepSpeed's defaults of stage3_max_live_parameters and stage3_max_reuse_distance
GROUP = 10**9  # parameters; DeepSpeed's default of sub_group_size
BUCKET = 5 * 10**8  # parameters; DeepSpeed's default of reduce_bucket_size
MOST = 6  # layers that are traced for the sake of buckets which need more


@dataclass(frozen=True)
class Layers:
    """Of a model as a run cuts it."""

    of_stage: tuple[int, ...]
    parameters: int  # of one layer, on all tensor-parallel ranks together
    others: int  # parameters of the rest of the model, likewise

    def depths(self, config: RunConfig, copies: int) -> tuple[int, int] | None:
        """Of how few layers two traces show how memory grows with more of them; None: no fewer than half of all.

        None too where ZeRO-3's optimizer goes through a rank's share in several groups.
        """
        return None if self._in_groups(config, copies) else self.depths_of_passes(config)

    def depths_of_passes(self, config: RunConfig) -> tuple[int, int] | None:
        """The same for what is held in forward and backward alone.

        With ZeRO-3 that is after so many that no more parameters are gathered at a time, and buckets are full. Those
        of ZeRO 1 and 2 are not filled alike, so the second trace has about as many layers more as fill a bucket or a
        few: where one ends in both, one ends in the whole model.
        """
        stage, zero = config.parallel.zero_stage, config.deepspeed.get("zero_optimization", {})
        each = self.parameters / config.parallel.tensor_parallel_size
        bucket = int(zero.get("reduce_bucket_size", BUCKET))
        first, more = 2, 1
        if stage == 3:
            names = ("stage3_max_live_parameters", "stage3_max_reuse_distance")
            live = max(int(zero.get(name, LIVE)) for name in names)
            first = max(3, math.ceil((live + bucket) / each) + 1)
        elif stage:
            first, more = min(MOST, max(3, math.ceil(bucket / each) + 1)), _period(bucket / each)
        return (first, first + more) if first + more <= min(self.of_stage) // 2 else None

    def _in_groups(self, config: RunConfig, copies: int) -> bool:
        """Not under an adapter, which has few parameters, nor if backward updates them."""
        can: Any = config.registry.component("optimizer", config.optimizer.type).can
        if config.parallel.zero_stage < 3 or config.adapter is not None or can.fuses_backward:
            return False
        whole = max(self.of_stage) * self.parameters + self.others
        most = int(config.deepspeed.get("zero_optimization", {}).get("sub_group_size", GROUP))
        return whole / (config.parallel.tensor_parallel_size * copies) > most


def _period(bucket: float) -> int:
    """How many layers more come closest to whole buckets, each of `bucket` layers."""

    def off(more: int) -> float:
        return abs(more / bucket - max(1, round(more / bucket)))

    return min(range(1, MOST + 1), key=off)


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
    each, whole = _parameters(layers[0]), _parameters(model)
    of_stage = tuple(len(cut.owned_layers(stage)) for stage in range(cut.pipeline_size))
    return Layers(of_stage, each, whole - len(layers) * each)


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


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
