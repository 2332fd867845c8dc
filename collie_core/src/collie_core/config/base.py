"""What every section of the configuration shares: frozen, closed, and exact about numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from collie_core.storage import is_url

if TYPE_CHECKING:
    from collie_core.config.run import RunConfig

LARGEST = 2**63 - 1  # what torch, numpy and a C long hold


class ConfigModel(BaseModel):
    """A section: immutable, without unknown keys, without NaN or infinity, and `true` is not the number 1."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _exact_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic takes `true` for 1 and integers of any length; a run cannot mean either."""
        assert info.field_name is not None
        annotation = cls.model_fields[info.field_name].annotation
        for number in _numbers(value):
            if isinstance(number, bool) and _wants_number(annotation):
                raise PydanticCustomError("bool_as_number", "must be a number, not true or false")
            if abs(number) > LARGEST:
                raise PydanticCustomError("too_large", "must be smaller than 2^63")
        return value


def _numbers(value: object) -> Iterator[int]:
    """The integers, booleans among them, of a value or of the items of a list."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int):
        yield value


def _wants_number(annotation: Any) -> bool:
    """Whether a field, or the items of one, may be numbers and not booleans."""
    parts = _parts(annotation)
    return not any(part is bool or isinstance(part, bool) for part in parts) and any(
        part in (int, float) or isinstance(part, int) for part in parts
    )


def _parts(annotation: Any) -> list[Any]:
    """The types, and the values of literals, that an annotation is made of."""
    inner = get_args(annotation)
    return [part for argument in inner for part in _parts(argument)] if inner else [annotation]


def _plain(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """Only what YAML and JSON can hold, so that a run's configuration can be written down and read back."""
    for path, item in _leaves(value):
        if isinstance(item, float) and not math.isfinite(item):
            raise PydanticCustomError("not_finite", "holds a number that is not finite: {path}", {"path": path})
        if isinstance(item, int) and abs(item) > LARGEST:
            raise PydanticCustomError("too_large", "holds a number beyond 2^63: {path}", {"path": path})
        if not isinstance(item, str | int | float | None):
            kind = type(item).__name__
            raise PydanticCustomError(
                "not_plain", "holds a {kind}, which a YAML file cannot: {path}", {"kind": kind, "path": path}
            )
    return value


def _leaves(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield path or "its keys", key if not isinstance(key, bool) else object()
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}.{index}")
    else:
        yield path, value


PlainMapping = Annotated[dict[str, Any], AfterValidator(_plain)]
"""Free keys and values, as far as a YAML file can hold them."""


def _on_this_machine(path: str) -> str:
    if is_url(path):
        raise ValueError("must be a folder of this machine, not a URL")
    return path


LocalFolder = Annotated[str, Field(min_length=1), AfterValidator(_on_this_machine)]
"""Where files are written to and changed, which no store can do."""


class ComponentConfig(ConfigModel):
    """The section of a plugin: `type`, and the plugin's own fields."""

    for_the_core: ClassVar[frozenset[str]] = frozenset({"type"})  # fields that are not handed to the plugin

    type: str = Field(description="The name of the plugin.")


class AdapterConfig(ComponentConfig):
    """The section of an adapter."""

    for_the_core: ClassVar[frozenset[str]] = frozenset({"type", "name", "adapter_name_or_path"})

    name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        description="What it is called beside other adapters of the same base model.",
    )
    adapter_name_or_path: str | None = Field(
        None,
        description="A saved adapter to go on from, a folder or URL. It brings its own options, so none is written "
        "beside it.",
    )

    def refused(self, config: RunConfig) -> str:
        """Why this adapter cannot be trained in this run; "" when it can. For plugins to override."""
        return ""


class ParamGroup(ConfigModel):
    """Parameters with options of their own. An optimizer that has more of them declares a subclass."""

    match: str = Field(
        min_length=1, description='Names of parameters, * for any text, as in "*.bias". The first match counts.'
    )
    lr: float | None = Field(None, ge=0, description="Instead of optimizer.lr.")
    weight_decay: float | None = Field(
        None, ge=0, description="Instead of optimizer.weight_decay, and for vectors too."
    )

    @property
    def options(self) -> dict[str, Any]:
        """What was set, as a torch parameter group has it."""
        return {name: value for name, value in self if name != "match" and value is not None}


class OptimizerConfig(ComponentConfig):
    """The section of an optimizer."""

    for_the_core: ClassVar[frozenset[str]] = frozenset({"type", "param_groups"})

    lr: float = Field(gt=0, description="Learning rate after warm-up: the peak of the schedule.")
    weight_decay: float = Field(0.0, ge=0, description="Decay of matrices and embeddings; vectors have none.")
    param_groups: list[ParamGroup] = Field([], description="Parameters with options of their own.")
