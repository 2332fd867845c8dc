"""What a check is given: the plugin under test, and the means to run it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from collie_core.api import Component, ComponentConfig, Plugins
from collie_testkit.zygote import Zygote


@dataclass
class Material:
    """What an author may give beside the name of the plugin. None of it is needed.

    Args:
        options: fields of the plugin's section, for those that have no default and for others to try.
        reference: of an optimizer, (weights in float64, list of gradients, **section) -> weights after these steps.
        golden: of a metric, samples and what they give: (predictions, targets, numbers by name).
        config: of a model family, a small config.json as a mapping; without it one is made.
        write: of a model family whose files transformers does not read, (folder, config) -> writes random weights.
        stock: of such a family, folder -> the transformers model with these weights, to compare with.
        ask: of a server that does not speak HTTP as OpenAI has it, (where, prompt) -> its greedy answer of 12 tokens.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    reference: Callable[..., Any] | None = None
    golden: tuple[Any, Any, Mapping[str, float]] | None = None
    config: Mapping[str, Any] | None = None
    write: Callable[[Path, Mapping[str, Any]], None] | None = None
    stock: Callable[[Path], Any] | None = None
    ask: Callable[[str, str], str] | None = None


@dataclass
class Shared:
    """What the checks of one plugin have together.

    Attributes:
        folder: empty at the start.
        together: whether all runs on as many ranks are made once one is asked for; see `launches`.
        outcomes: of these runs by name.
    """

    folder: Path
    together: bool = True
    outcomes: dict[str, Any] = field(default_factory=dict)


@dataclass
class Context:
    """A plugin under test. `folder` is empty, and the check's own; without `shared` the check shares nothing."""

    kind: str
    name: str
    folder: Path
    zygote: Callable[[], Zygote]
    material: Material = field(default_factory=Material)
    plugins: Plugins = field(default_factory=Plugins.discover)
    shared: Shared = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self.shared = self.shared or Shared(self.folder)

    @property
    def entry(self) -> Any:
        """What the metadata of its package says of it."""
        return self.plugins.find(self.kind, self.name)

    @property
    def component(self) -> Component:
        """Its description."""
        return self.plugins.component(self.kind, self.name)

    @property
    def can(self) -> Any:
        """What it declares."""
        return self.component.can

    @property
    def section(self) -> dict[str, Any]:
        """Its section, as a person would write it."""
        return {"type": self.entry.qualified, **self._options}

    @property
    def written(self) -> dict[str, Any]:
        """The same for its own model, which knows no distributions."""
        return {"type": type_of(self.plugins.config_model(self.kind, self.name)), **self._options}

    @property
    def config(self) -> ComponentConfig:
        """Its section, validated."""
        return self.plugins.config_model(self.kind, self.name).model_validate(self.written)

    @property
    def _options(self) -> dict[str, Any]:
        """With a learning rate, where the plugin has no default for it."""
        fields = self.plugins.config_model(self.kind, self.name).model_fields
        needed = {"lr": 1e-3} if "lr" in fields and fields["lr"].is_required() else {}
        return {**needed, **self.material.options}

    def build(self, **objects: Any) -> Any:
        """The thing itself; see the hook `collie_build_<kind>`."""
        return self.plugins.build(self.kind, self.name, config=self.config, **objects)

    def on_ranks(self, function: Callable[..., Any], ranks: int, *args: Any, limit_s: float = 120.0) -> list[Any]:
        """What `function(*args)` of a module of the kit returns on each of some gloo ranks."""
        file = sys.modules[function.__module__].__file__
        assert file is not None
        request = (list(sys.path), file, function.__name__, args)
        return self.zygote().run(__file__, "on_this_rank", world_size=ranks, args=request, limit_s=limit_s)


def type_of(model: type[ComponentConfig]) -> str:
    """The `type` that a section of this model has."""
    annotation = model.model_fields["type"].annotation
    return str(get_args(annotation)[0] if get_origin(annotation) is Literal else model.model_fields["type"].default)


def on_this_rank(path: list[str], file: str, function: str, args: tuple[Any, ...]) -> Any:
    """What every rank runs: it finds the plugins that the test found, whenever its process was made."""
    import warnings

    sys.path[:] = path
    warnings.simplefilter("ignore")  # what libraries deprecate is no fault of the plugin
    name = f"collie_testkit.{Path(file).stem}"
    return getattr(__import__(name, fromlist=["_"]), function)(*args)
