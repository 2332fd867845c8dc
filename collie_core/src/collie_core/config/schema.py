"""One JSON Schema of the whole file, with the section of every installed plugin, for editors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.errors import PydanticUserError
from pydantic.json_schema import models_json_schema

from collie_core.config.component import SCHEMA_MARK
from collie_core.config.run import DEFAULT_OPTIMIZER, RunConfig
from collie_core.errors import PluginError
from collie_core.plugins import CORE, Entry, Plugins

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_KINDS = ("optimizer", "adapter", "metric", "evaluator", "tracker", "server")  # those that have a section in the file


def json_schema(registry: Plugins) -> dict[str, Any]:
    """The schema (draft 2020-12). A plugin that does not work has no section in it."""
    models = dict(_models(registry))
    described: list[type[BaseModel]] = [RunConfig, *models.values()]
    refs, definitions = models_json_schema([(model, "validation") for model in described])
    root, shared = refs[RunConfig, "validation"], definitions["$defs"]
    for entry, model in models.items():
        section = _resolved(refs[model, "validation"], shared)
        shared[_key(entry)] = _section(registry, entry, section)
    for kind in _KINDS:
        shared[kind] = _choice(registry, kind, [entry for entry in models if entry.kind == kind])
    schema = _replace_marks({**_resolved(root, shared), "$defs": shared})
    assert isinstance(schema, dict)
    return {
        "$schema": DIALECT,
        **_reachable(schema),
        "title": "CoLLiE run",
        "description": "A run of CoLLiE.",
    }


def _models(registry: Plugins) -> Iterator[tuple[Entry, type[BaseModel]]]:
    for entry in registry.entries:
        if entry.kind not in _KINDS:
            continue
        try:
            model = registry.config_model(entry.kind, entry.qualified)
            model.model_json_schema()  # a field of a type that JSON cannot express
        except (
            PluginError,
            PydanticUserError,
        ):  # shown by `collie plugins --check`; nobody asked for it here
            continue
        yield entry, model


def _section(registry: Plugins, entry: Entry, schema: Mapping[str, Any]) -> dict[str, Any]:
    """A plugin's section: `type` tells those of a kind apart, so only the default one may lack it."""
    properties = dict(schema.get("properties", {}))
    summary = registry.component(entry.kind, entry.qualified).summary or entry.summary
    properties["type"] = {"enum": _names(registry, entry), "description": summary}
    required = [name for name in schema.get("required", []) if name != "type"]
    if (entry.kind, entry.qualified) != ("optimizer", f"{CORE}:{DEFAULT_OPTIMIZER}"):
        required.insert(0, "type")
    return {**schema, "title": entry.name, "properties": properties, "required": required}


def _choice(registry: Plugins, kind: str, entries: list[Entry]) -> dict[str, Any]:
    """A section of one of the installed plugins, or only its name where nothing else is required."""
    names = [name for entry in entries for name in _names(registry, entry)]
    return {"oneOf": [{"enum": names}, *({"$ref": f"#/$defs/{_key(entry)}"} for entry in entries)]}


def _names(registry: Plugins, entry: Entry) -> list[str]:
    return [entry.qualified] if registry.state(entry) else [entry.name, entry.qualified]


def _key(entry: Entry) -> str:
    return f"{entry.kind}.{entry.distribution}.{entry.name}"


def _resolved(schema: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    reference = schema.get("$ref")
    return dict(shared[reference.removeprefix("#/$defs/")] if reference else schema)


def _replace_marks(schema: Any) -> Any:
    """Where a field is the section of a component, the choice among the plugins of its kind."""
    if isinstance(schema, list):
        return [_replace_marks(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    plain = {key: _replace_marks(item) for key, item in schema.items() if key != SCHEMA_MARK}
    return {"$ref": f"#/$defs/{schema[SCHEMA_MARK]}", **plain} if SCHEMA_MARK in schema else plain


def _reachable(schema: dict[str, Any]) -> dict[str, Any]:
    """Without the definitions that nothing refers to any more."""
    shared = schema.pop("$defs")
    wanted, queue = {}, list(_references(schema))
    while queue:
        name = queue.pop()
        if name not in wanted:
            wanted[name] = shared[name]
            queue += _references(shared[name])
    return {**schema, "$defs": dict(sorted(wanted.items()))}


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        if isinstance(reference := schema.get("$ref"), str):
            yield reference.removeprefix("#/$defs/")
        for item in schema.values():
            yield from _references(item)
    elif isinstance(schema, list):
        for item in schema:
            yield from _references(item)
