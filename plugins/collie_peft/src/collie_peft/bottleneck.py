"""Bottleneck adapters: a small network after a layer's output, which peft does not have.

y + W_up f(W_down y + b_down) + b_up for the output y of a layer, with W_up = 0 at the start, so that the model is as it
was. After attention and feed-forward: Houlsby et al., arXiv 1902.00751; after feed-forward alone: Pfeiffer et al.,
arXiv 2005.00247. Where tensor-parallel ranks share the layer by its inputs, each has the whole output and computes the
same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from collie_core.api import ModelError, is_stage
from collie_peft.files import CONFIG, WEIGHTS, read_tensors
from collie_peft.injected import check_names, matches

if TYPE_CHECKING:
    from collie_peft.bottleneck_config import BottleneckConfig

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


class Bottleneck(nn.Module):
    """Stands around a linear layer."""

    def __init__(self, base_layer: nn.Module, width: int, size: int, function: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.down = nn.Linear(width, size)
        self.up = nn.Linear(size, width)
        self.function = FUNCTIONS[function]
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    @property
    def weight(self) -> Any:
        """Of the layer, for whoever asks for its type or place."""
        return self.base_layer.weight

    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        output: Tensor = self.base_layer(*inputs, **options)
        hidden: Tensor = self.up(self.function(self.down(output.to(self.down.weight.dtype))))
        return output + hidden.to(output.dtype)


class BottleneckAdapter:
    """Puts bottlenecks onto a transformers model."""

    def attach(self, model: nn.Module, config: BottleneckConfig) -> nn.Module:
        """Put one around each target layer and freeze the rest.

        Raises:
            ModelError: a name matches nothing, or no linear layer.
        """
        if not is_stage(model):
            check_names(model, "target_modules", config.targets)
        model.requires_grad_(False)
        for name, module in list(model.named_modules()):
            if any(matches(end, [name]) for end in config.targets):
                width = getattr(module, "out_features", None) or getattr(module, "nf", None)
                if width is None:
                    raise ModelError(f"adapter.target_modules: {name} is a {type(module).__name__}, no linear layer")
                size = max(1, width // config.reduction_factor)
                model.set_submodule(name, Bottleneck(module, width, size, config.non_linearity))
        model.collie_bottleneck = config  # type: ignore[assignment]
        return model

    def cut(self, name: str, shape: tuple[int, ...]) -> tuple[int, str] | None:
        """Nothing is: the output of the layer is whole on every rank."""
        return None

    def save(self, model: nn.Module, path: Path, state: Mapping[str, Tensor]) -> None:
        """Write weights and options; peft does not know them."""
        config: Any = model.collie_bottleneck
        options = {"peft_type": "BOTTLENECK", **config.model_dump(exclude={*config.for_the_core})}
        save_file(dict(state), path / WEIGHTS, metadata={"format": "pt"})
        (path / CONFIG).write_text(json.dumps(options, indent=2) + "\n")

    def load(self, model: nn.Module, path: Path) -> nn.Module:
        """Put on an adapter like the one in `path`.

        Raises:
            ModelError: its configuration cannot be read.
        """
        from collie_peft.bottleneck_config import BottleneckConfig

        try:
            options = json.loads((path / CONFIG).read_text())
            options.pop("peft_type")
            config = BottleneckConfig.model_validate(options)
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"{path / CONFIG} cannot be read: {str(error).strip().splitlines()[0]}") from error
        return self.attach(model, config)

    def state(self, path: Path) -> Mapping[str, Tensor]:
        """The saved values.

        Raises:
            ModelError: they cannot be read.
        """
        return read_tensors(path / WEIGHTS)
