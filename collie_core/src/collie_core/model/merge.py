"""One model of a base model and an adapter, written tensor by tensor: no more than one layer is in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from collie_core.config.model import ModelConfig
from collie_core.config.tokenizer import TokenizerConfig
from collie_core.data.tokenizer import build_tokenizer
from collie_core.errors import ModelError
from collie_core.hookspecs import MergeableAdapter
from collie_core.model.adapters import trainable
from collie_core.model.build import base_of_adapter, load_adapter, load_pretrained, new_model, plugin_of
from collie_core.model.export import write_configs, write_folder
from collie_core.model.part import part_of
from collie_core.model.weights import Checkpoint, Read, save
from collie_core.topology import Topology

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from collie_core.plugins import Plugins

PROBE = (2, 32)  # rows and tokens whose logits are compared


def merge_adapter(adapter: Path, out: Path, registry: Plugins, *, base: str = "", verify: bool = False) -> None:
    """Write the model in `base` (default: the one that the adapter names) with `adapter` merged into it to `out`.

    Types and layout of the files are those of the base model.

    Raises:
        ModelError: the adapter does not fit, cannot be merged or changes nothing; or with `verify`, the merged model
            does not give the logits of the base model with the adapter on it. Nothing is written then.
    """
    saved = base_of_adapter(adapter)
    if not isinstance(plugin := registry.load("adapter", plugin_of(saved, registry)), MergeableAdapter):
        raise ModelError(f"a {saved.type} adapter cannot be merged into the weights of its base model")
    base = base or saved.base
    dtype = _dtype_of(base)
    lazy = _Lazy()
    section = ModelConfig(model_name_or_path=base)
    # New tokens are in the tokenizer beside the adapter.
    named = section if saved.vocabulary is None else ModelConfig(model_name_or_path=str(adapter))
    tokenizer = build_tokenizer(TokenizerConfig(), named)
    options: dict[str, Any] = {"vocabulary": saved.vocabulary, "store": lazy.store}
    model: Any = new_model(section, registry, tokenizer, torch.float32, **options)
    part = part_of(model)
    assert part is not None
    model = load_adapter(model, adapter, registry, Topology())
    lazy.prepare(model, plugin)

    def write(folder: Path) -> None:
        save(folder, model, part, lazy.with_values, dtype=dtype, held=_held(model))
        if not lazy.changed:
            raise ModelError(f"merging {adapter} changes nothing: its update is zero")
        write_configs(folder, model, part, dtype)
        tokenizer.save_pretrained(folder)
        if verify:
            _compare(folder, adapter, base, registry)

    write_folder(out, write)


class _Lazy:
    """Parameters without values, which come from the files when they are wanted, with the adapter merged in."""

    def __init__(self) -> None:
        self.changed = False
        self._reads: dict[int, Read] = {}
        self._around: dict[int, nn.Module] = {}
        self._own: set[int] = set()
        self._adapter: MergeableAdapter | None = None

    def store(self, module: nn.Module, name: str, shape: tuple[int, ...], read: Read) -> None:
        """See `Store`."""
        parameter = nn.Parameter(torch.zeros(()).expand(shape), requires_grad=False)
        module._parameters[name] = parameter
        self._reads[id(parameter)] = read

    def prepare(self, model: nn.Module, adapter: MergeableAdapter) -> None:
        """Find out what is merged into which parameter."""
        self._adapter = adapter
        self._own = {id(value) for value in trainable(model).values()}
        for module in model.modules():
            if isinstance(base := getattr(module, "base_layer", None), nn.Module):
                self._around[id(base.weight)] = module

    @contextmanager
    def with_values(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Inside, the parameters have their merged values. See `Gathered`."""
        asked = [parameter for parameter in parameters if id(parameter) not in self._own]
        self.changed = self.changed or len(asked) < len(parameters)  # trained and saved whole
        before = [parameter.data for parameter in asked]
        for parameter in asked:
            parameter.data = self._reads[id(parameter)](None)
            if (module := self._around.get(id(parameter))) is not None:
                self._merge(module, parameter)
        yield
        for parameter, empty in zip(asked, before, strict=True):
            parameter.data = empty

    def _merge(self, module: nn.Module, parameter: nn.Parameter) -> None:
        assert self._adapter is not None
        original = parameter.data.clone()
        self._adapter.merge(module)
        self.changed = self.changed or not torch.equal(parameter.data, original)


def _held(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by the names that they have without the adapter; trained copies instead of originals."""
    held: dict[str, Tensor] = dict(model.named_buffers())
    for name, value in model.named_parameters(remove_duplicate=False):
        plain = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        head, copied, tail = plain.partition(".modules_to_save.")
        if copied:
            held[f"{head}.{tail.partition('.')[2]}"] = value
        else:
            held.setdefault(plain, value)
    return held


def _dtype_of(base: str) -> torch.dtype:
    checkpoint = Checkpoint.open(base)
    return next(kind for key in checkpoint.keys() if (kind := checkpoint.dtype(key)).is_floating_point)  # noqa: SIM118


@torch.no_grad()
def _compare(merged: Path, adapter: Path, base: str, registry: Plugins) -> None:
    """Raises ModelError: merged and active adapter do not give the same logits."""
    found, expected = (_logits(load_adapted(str(path), base, registry)) for path in (merged, adapter))
    exact = _dtype_of(base) == torch.float32
    tolerance = (1e-4 if exact else 5e-2) * float(expected.std())
    difference = float((found - expected).abs().max())
    if not difference <= tolerance:
        raise ModelError(
            f"the merged model's logits differ by {difference:.2g} from those of the base model with the adapter, and "
            f"{tolerance:.2g} is allowed; nothing was written"
        )


def load_adapted(folder: str, base: str, registry: Plugins) -> PreTrainedModel:
    """A merged model, or an adapter's folder on `base`, in float32 and one process."""
    tokenizer = build_tokenizer(TokenizerConfig(), ModelConfig(model_name_or_path=base))
    is_adapter = (Path(folder) / "adapter_config.json").exists()
    section = ModelConfig(model_name_or_path=base if is_adapter else folder)
    vocabulary = base_of_adapter(Path(folder)).vocabulary if is_adapter else None
    model = load_pretrained(section, registry, tokenizer, torch.float32, vocabulary=vocabulary)
    if is_adapter:
        model = load_adapter(model, Path(folder), registry, Topology())
    return cast("PreTrainedModel", model.eval())


def _logits(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, PROBE, generator=generator)
    return cast(Tensor, model(input_ids=ids, use_cache=False).logits.float())
