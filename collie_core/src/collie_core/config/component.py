"""The section of a plugin inside the core's configuration: `type` decides whose model validates the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from collie_core.config.base import ComponentConfig
from collie_core.errors import PluginError
from collie_core.plugins import Plugins

SCHEMA_MARK = "x-collie-kind"  # `schema.py` replaces it by the sections of the installed plugins


@dataclass(frozen=True)
class OfKind:
    """Marks a field as the section of a component: `Annotated[OptimizerConfig, OfKind("optimizer")]`."""

    kind: str
    default: str = ""  # the `type` of a section that names none

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def validate(value: Any, info: core_schema.ValidationInfo) -> ComponentConfig:
            registry = (info.context or {}).get("registry") or Plugins.discover()
            return self.validate(registry, source, value)

        return core_schema.with_info_plain_validator_function(
            validate, serialization=core_schema.plain_serializer_function_ser_schema(_dump, info_arg=True)
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {SCHEMA_MARK: self.kind}

    def validate(self, registry: Plugins, base: type[ComponentConfig], value: Any) -> ComponentConfig:
        """The validated section, an instance of the plugin's own model.

        Raises:
            ValidationError: with locations relative to the section; pydantic puts the field's own in front.
        """
        if isinstance(value, str):
            value = {"type": value}
        if isinstance(value, ComponentConfig):
            if isinstance(value, registry_model(registry, self.kind, base, value.type)):
                return value
            value = value.model_dump()
        if not isinstance(value, Mapping):
            raise PydanticCustomError("section", "must be a section with `type:`, or the name of a plugin")
        if "type" not in value and not self.default:
            raise _at_type("missing", "missing", value)
        if not isinstance(name := value.get("type", self.default), str):
            raise _at_type("string_type", "must be text", name)
        model = registry_model(registry, self.kind, base, name)
        written = {**value, "type": _own_name(model, name)}
        section = model.model_validate(written, context={"registry": registry})  # it may hold sections of plugins
        return section.model_copy(update={"type": name}) if ":" in name else section


def _dump(section: ComponentConfig, info: core_schema.SerializationInfo) -> dict[str, Any]:
    # No warnings: `type: distribution:name` is kept as written, where the plugin's model has the name alone.
    return section.model_dump(mode=info.mode, warnings=False)


def registry_model(registry: Plugins, kind: str, base: type[ComponentConfig], name: str) -> type[ComponentConfig]:
    """The plugin's model; whatever is wrong with the plugin is an error at `type`."""
    try:
        model = registry.config_model(kind, name)
    except PluginError as error:
        raise _at_type("plugin", str(error), name) from error
    if not issubclass(model, base):
        reason = f"the config model of {registry.find(kind, name)} must be a subclass of {base.__name__}"
        raise _at_type("plugin", reason, name)
    return model


def _own_name(model: type[ComponentConfig], written: str) -> str:
    """The spelling of the plugin itself: names are compared without case and without `distribution:`."""
    annotation = model.model_fields["type"].annotation
    return str(get_args(annotation)[0]) if get_origin(annotation) is Literal else written


def _at_type(kind: str, message: str, value: object) -> ValidationError:
    error = kind if kind == "missing" else PydanticCustomError(kind, "{message}", {"message": message})
    return ValidationError.from_exception_data("section", [{"type": error, "loc": ("type",), "input": value}])


def section_of(annotation: Any, metadata: list[Any]) -> type[BaseModel] | OfKind | None:
    """The model or the kind of component that a field's value, or each item of it, is validated by."""
    for mark in metadata:
        if isinstance(mark, OfKind):
            return mark
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    nested = getattr(annotation, "__metadata__", ())
    found = (section_of(part, [*nested]) for part in get_args(annotation))
    return next((section for section in found if section is not None), None)
