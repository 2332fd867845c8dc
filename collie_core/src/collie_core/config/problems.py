"""pydantic's errors, in sentences for the person who wrote the file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from collie_core.config.component import OfKind, section_of
from collie_core.errors import MISSING, PluginError, Problem

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

    from collie_core.plugins import Plugins

_WHOLE, _NUMBER, _SWITCH = "must be a whole number", "must be a number", "must be true or false"
_TEXT, _LIST, _SECTION = "must be text", "must be a list", "must be a section, `key: value` lines"
_RULES = {
    "missing": "is required",
    "extra_forbidden": "is not a known key",
    "int_type": _WHOLE,
    "int_parsing": _WHOLE,
    "int_parsing_size": _WHOLE + " below 2^63",
    "int_from_float": _WHOLE,
    "float_type": _NUMBER,
    "float_parsing": _NUMBER,
    "finite_number": "must be a finite number",
    "bool_type": _SWITCH,
    "bool_parsing": _SWITCH,
    "string_type": _TEXT,
    "string_unicode": "must be valid Unicode text",
    "string_too_short": "must have at least {min_length} character(s)",
    "string_too_long": "must have at most {max_length} character(s)",
    "string_pattern_mismatch": "must match the pattern {pattern}",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "multiple_of": "must be a multiple of {multiple_of}",
    "list_type": _LIST,
    "tuple_type": _LIST,
    "set_type": _LIST,
    "dict_type": _SECTION,
    "mapping_type": _SECTION,
    "model_type": _SECTION,
    "model_attributes_type": _SECTION,
    "dataclass_type": _SECTION,
    "too_short": "must have at least {min_length} item(s), has {actual_length}",
    "too_long": "must have at most {max_length} item(s), has {actual_length}",
    "none_required": "must be empty",
    "invalid_key": "must have keys that are text",
}


@dataclass(frozen=True)
class Guide:
    """Knows which keys there are, in the core's sections and in those of plugins."""

    root: type[BaseModel]
    registry: Plugins

    def fields(self, path: Sequence[str | int], data: object) -> frozenset[str]:
        """The keys that the section at `path` of `data` takes; none when it is free or not a section."""
        model = self.model(path, data)
        return frozenset(model.model_fields) if model else frozenset()

    def model(self, path: Sequence[str | int], data: object) -> type[BaseModel] | None:
        """The model of the section at `path` of `data`, that of its plugin for a component."""
        section: type[BaseModel] | OfKind | None = self.root
        for part in path:
            if isinstance(part, str):
                model = self._model(section, data)
                field = model.model_fields.get(part) if model else None
                section = section_of(field.annotation, field.metadata) if field else None
            data = _child(data, part)
        return self._model(section, data)

    def _model(self, section: type[BaseModel] | OfKind | None, data: object) -> type[BaseModel] | None:
        if not isinstance(section, OfKind):
            return section
        name = data.get("type", section.default) if isinstance(data, Mapping) else getattr(data, "type", data)
        name = section.default if name is MISSING else name
        if not isinstance(name, str):
            return None
        try:
            return self.registry.config_model(section.kind, name)
        except PluginError:  # reported where the section is validated
            return None

    def homes(self, name: str, data: object) -> list[str]:
        """The sections that do have a key of this name."""
        return [section for section in self.root.model_fields if name in self.fields([section], data)]


def translate(error: ValidationError, data: Mapping[str, Any], guide: Guide) -> list[Problem]:
    """One problem per key; what the members of a union say about it is joined by "or"."""
    found: dict[str, list[Problem]] = {}
    for details in error.errors(include_url=False):
        path, value = _written(details, data)
        key = ".".join(map(str, path))
        hint = _unknown_key(path, data, guide) if details["type"] == "extra_forbidden" else _hint(details, value)
        found.setdefault(key, []).append(Problem(key, _rule(details), value, hint))
    return [_joined(problems) for problems in found.values()]


def _written(details: ErrorDetails, data: object) -> tuple[list[str | int], object]:
    """The part of pydantic's location that the person wrote (it adds members of unions), and its value."""
    path: list[str | int] = []
    for part in details["loc"]:
        child = _child(data, part)
        if child is MISSING:
            break
        path, data = [*path, part], child
    if details["type"] == "missing" and isinstance(details["loc"][-1], str):
        return [*path, details["loc"][-1]], MISSING
    return path, data


def _child(data: object, part: str | int) -> object:
    if isinstance(data, Mapping):
        return data.get(part, MISSING)
    if isinstance(data, list | tuple) and isinstance(part, int) and part < len(data):
        return data[part]
    return MISSING


def _rule(details: ErrorDetails) -> str:
    kind, context = details["type"], details.get("ctx", {})
    if kind == "missing" and isinstance(details["loc"][-1], int):
        return "has too few items"
    if kind in ("literal_error", "enum"):
        return "must be " + str(context["expected"])
    if kind in ("value_error", "assertion_error") and "error" in context:
        return _sentence(str(context["error"]))
    if kind == "plugin":  # the first line says what is wrong, the others what to do
        return _sentence(details["msg"].partition("\n")[0])
    if kind in _RULES:
        return _RULES[kind].format(**{name: _number(item) for name, item in context.items()})
    plain = details["msg"].replace("Input should", "must").replace("must be a valid", "must be a")
    return _sentence(plain.replace("Input ", "the value "))


def _number(value: object) -> object:
    return f"{value:g}" if isinstance(value, float) else value


def _sentence(text: str) -> str:
    return text.strip().rstrip(".") or "is refused"


def _hint(details: ErrorDetails, value: object) -> str:
    if details["type"] == "plugin":
        return "".join(f"\n{line}" for line in details["msg"].splitlines()[1:])
    if details["type"] == "string_type" and isinstance(value, bool | int | float):
        return "If it is meant as text, put it in quotes."
    if details["type"] == "literal_error" and isinstance(value, str):
        return _did_you_mean(value, re.findall(r"'([^']*)'", str(details.get("ctx", {})["expected"])))
    return ""


def _unknown_key(path: Sequence[str | int], data: object, guide: Guide) -> str:
    *section, name = path
    known = guide.fields(section, data)
    if hint := _did_you_mean(str(name), known):
        return hint
    homes = [home for home in guide.homes(str(name), data) if [home] != section]
    if homes:
        return f"It belongs to {' or '.join(f'{home}: {home}.{name}' for home in homes)}."
    return f"Known here: {', '.join(sorted(known))}." if known else ""


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name.lower(), sorted(known), n=1, cutoff=0.7)
    return f"Did you mean {near[0]}?" if near else ""


def _joined(problems: list[Problem]) -> Problem:
    first = problems[0]
    rules = list(dict.fromkeys(problem.rule for problem in problems))
    if not all(rule.startswith("must be ") for rule in rules):
        return first
    rule = " or ".join([rules[0], *(rule.removeprefix("must be ") for rule in rules[1:])])
    hint = next((problem.hint for problem in problems if problem.hint), "")
    return Problem(first.key, rule, first.value, hint)
