"""Several adapters on one base model, by name: each is a model of its own that shares the base's frozen weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from collie_core import storage
from collie_core.errors import ModelError
from collie_core.model.build import ALONE, adapters_below, base_of_adapter, load_adapter
from collie_core.model.stages import lend
from collie_core.plugins import Plugins

if TYPE_CHECKING:
    from collie_core.topology import Topology


def folders_by_name(chosen: Iterable[str]) -> dict[str, Path]:
    """The folders of adapters by name, as people write them: `NAME=DIR`, or `DIR` for the name that is saved in it.

    A folder in which peft has saved several brings them all.

    Raises:
        ModelError: there is no adapter in one, or two have one name.
    """
    found: dict[str, Path] = {}
    for text in chosen:
        for name, folder in _named(text):
            if name in found:
                raise ModelError(
                    f"two adapters are called {name}: {found[name]} and {folder}; write NAME={folder} to give one "
                    "another name"
                )
            found[name] = folder
    return found


def with_adapters(
    base: nn.Module, folders: Mapping[str, Path], registry: Plugins | None = None, topology: Topology = ALONE
) -> dict[str, Any]:
    """The base model, or this rank's part of it, with each of the adapters on it alone. Collective.

    All share the base's weights, which are frozen; the base stays as it is and can be used beside them.

    Raises:
        ModelError: see `load_adapter`.
    """
    registry = Plugins.discover() if registry is None else registry
    models = {name: load_adapter(_sharing(base), folder, registry, topology) for name, folder in folders.items()}
    for model in models.values():
        lend(model)
    return models


def _named(text: str) -> list[tuple[str, Path]]:
    name, equals, folder = text.partition("=")
    if not equals:
        name, folder = "", text
    path = Path(storage.local_folder(folder))
    if not name and (below := adapters_below(path)):
        return [(one.name, one) for one in below]
    saved = base_of_adapter(path)
    return [(name or saved.name or path.name, path)]


def _sharing(base: nn.Module) -> nn.Module:
    """A copy of the modules, which hold the tensors of `base`."""
    base.requires_grad_(False)
    tensors = [*base.parameters(), *base.buffers()]
    return copy.deepcopy(base, {id(tensor): tensor for tensor in tensors})
