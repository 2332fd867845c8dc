"""docs/configuration.md: every key of the file, written from the same schema that editors use.

    python -m collie_core.config.reference docs/configuration.md

Documented are the core and the packs of this project; `collie plugins show NAME` documents any other plugin.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from collie_core.config.aliases import ALIASES
from collie_core.config.schema import json_schema
from collie_core.plugins import CATALOGUE, CORE, Plugins

PACKS = frozenset({CORE, *CATALOGUE.values()})  # without them the page would miss sections
_TYPES = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "null": "null",
    "object": "mapping",
    "array": "list",
}

Schema = Mapping[str, Any]


def configuration_page() -> str:
    """docs/configuration.md, for the installed packs of this project."""
    installed = Plugins.discover().entries
    schema = json_schema(Plugins(entry for entry in installed if entry.distribution in PACKS))
    shared: Schema = schema["$defs"]
    lines = [_INTRODUCTION]
    free = []
    for name, field in schema["properties"].items():
        if (kind := _component(field, shared)) is not None:
            lines += [f"## {name}", "", _line(field), *_choices(kind, shared)]
        elif (section := _model(field, shared)) is not None:
            lines += [f"## {name}", "", _line(field, section), *_section(name, section, shared)]
        else:
            free.append((name, field))
    lines += ["## Keys without a section", "", *_table(free, {}, shared), "", *_aliases()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def _section(name: str, section: Schema, shared: Schema) -> Iterator[str]:
    """The table of a section, then those of the sections in it and of the items of its lists."""
    properties = section["properties"]
    yield from ("", *_table(properties.items(), section, shared), "")
    items: dict[str, tuple[list[str], Schema]] = {}
    for key, field in properties.items():
        item = _model(field, shared)
        kind = _component(field, shared)
        if kind is not None:
            for each in (kind, *_kinds_inside(kind, shared)):
                yield from _choices(each, shared)
        elif item is not None:
            keys = items.setdefault(str(item["title"]), ([], item))[0]
            keys.append(f"{'An item of ' if _is_list(field) and not keys else ''}`{name}.{key}`")
    for keys, item in items.values():
        yield from (f"### {' and '.join(keys)}", "", *_table(item["properties"].items(), item, shared), "")


def _choices(kind: str, shared: Schema) -> Iterator[str]:
    """A table for each plugin of a kind."""
    found = [(key, section) for key, section in shared.items() if key.startswith(f"{kind}.")]
    for key, section in found:
        distribution = key.split(".")[1]
        summary = section["properties"]["type"]["description"]
        fields = [(name, field) for name, field in section["properties"].items() if name != "type"]
        yield from ("", f"### {kind} `type: {section['title']}`", "", f"From {distribution}: {summary}.", "")
        yield from _table(fields, section, shared) if fields else ("It has no other keys.",)
    yield ""


def _kinds_inside(kind: str, shared: Schema) -> list[str]:
    """The kinds of plugins whose sections stand in those of a kind, as metrics do in evaluators."""
    sections = [section for key, section in shared.items() if key.startswith(f"{kind}.")]
    found = (_component(field, shared) for section in sections for field in section["properties"].values())
    return list(dict.fromkeys(name for name in found if name is not None))


def _table(fields: Any, section: Schema, shared: Schema) -> Iterator[str]:
    yield "| key | type | default | what it is |"
    yield "|---|---|---|---|"
    for name, field in fields:
        required = name in section.get("required", ())
        default = "required" if required else f"`{json.dumps(_short(field['default']))}`" if "default" in field else ""
        cells = (f"`{name}`", _type(field, shared), default, field.get("description", ""))
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _short(default: Any) -> Any:
    """Sections of plugins by their type alone: the rest are their own defaults."""
    if isinstance(default, list) and all(isinstance(item, Mapping) and "type" in item for item in default):
        return [{"type": item["type"]} for item in default]
    return default


def _line(field: Schema, section: Schema | None = None) -> str:
    return str(field.get("description") or (section or {}).get("description", ""))


# -- what a value may be ------------------------------------------------------------------------------------


def _type(field: Schema, shared: Schema) -> str:
    """In words: `a`, `b` or null; whole number from 1; list of text."""
    *others, last = dict.fromkeys(_choices_of(field, shared))
    return f"{', '.join(others)} or {last}" if others else last


def _choices_of(field: Schema, shared: Schema) -> Iterator[str]:
    if "anyOf" in field:
        for choice in field["anyOf"]:
            yield from _choices_of(choice, shared)
    elif "$ref" in field:
        name = field["$ref"].removeprefix("#/$defs/")
        yield "section" if _is_model(shared[name]) else f"section of {'an' if name[0] in 'aeio' else 'a'} {name}"
    elif "const" in field:
        yield f"`{field['const']}`"
    elif "enum" in field:
        yield from (f"`{value}`" for value in field["enum"])
    elif field.get("type") == "boolean":
        yield from ("`true`", "`false`")
    elif field.get("type") == "array":
        yield _array(field, shared)
    else:
        yield _TYPES.get(field.get("type", ""), "anything") + _range(field)


def _array(field: Schema, shared: Schema) -> str:
    if "prefixItems" in field:
        return f"list of {len(field['prefixItems'])}, each a {_type(field['prefixItems'][0], shared)}"
    item = _type(field.get("items", {}), shared)
    return f"list of ({item})" if " or " in item else f"list of {item}"


def _range(field: Schema) -> str:
    whole = field.get("type") == "integer"
    above, below = field.get("exclusiveMinimum"), field.get("exclusiveMaximum")
    least, most = field.get("minimum"), field.get("maximum")
    if whole and above is not None:
        least, above = max(above + 1, least or 0), None
    if whole and below is not None:
        most, below = below - 1, None
    bounds = (("from", least), ("above", above), ("to", most), ("below", below))
    return "".join(f" {word} {value:.12g}" for word, value in bounds if value is not None)


def _model(field: Schema, shared: Schema) -> Schema | None:
    """The section that a field is, or that the items of it are; None when it is a plain value."""
    for name in _references(field):
        if _is_model(shared[name]):
            section: Schema = shared[name]
            return section
    return None


def _is_list(field: Schema) -> bool:
    return any(option.get("type") == "array" for option in (field, *field.get("anyOf", ())))


def _component(field: Schema, shared: Schema) -> str | None:
    """The kind of plugin whose section a field is, or the items of it are."""
    return next((name for name in _references(field) if not _is_model(shared[name])), None)


def _is_model(definition: Schema) -> bool:
    return "properties" in definition


def _references(field: Any) -> Iterator[str]:
    if isinstance(field, list):
        for item in field:
            yield from _references(item)
    elif isinstance(field, Mapping):
        if isinstance(field.get("$ref"), str):
            yield field["$ref"].removeprefix("#/$defs/")
        for key, value in field.items():
            if key in ("anyOf", "items"):
                yield from _references(value)


# -- the rest of the page -----------------------------------------------------------------------------------


def _aliases() -> Iterator[str]:
    names: dict[str, list[str]] = {}
    for name, alias in ALIASES.items():
        names.setdefault(alias.target, []).append(f"`{name}`")
    yield from ("## Names of other tools", "", "They are understood, with a note that says the name here.", "")
    yield from ("| here | elsewhere |", "|---|---|")
    for target, others in names.items():
        yield f"| `{target}` | {', '.join(others)} |"


_INTRODUCTION = """\
# Configuration

Every key of the file, with its type and its default. This page is written by `make docs` from the models that
validate the file; `collie schema -o collie.schema.json` writes the same for editors, with every plugin that is
installed.

A key can be set behind the file name too: `collie train run.yaml train.max_steps=10 data.train.0.weight=2`.
A section that is left out has its defaults. A key that is not listed here is an error. `model`, `tokenizer`,
`optimizer`, `lr_scheduler` and `adapter` may be one word instead of a section: a path for `model`, `type` for the
others. Combinations that are refused are listed in [compatibility.md](compatibility.md).
"""


def main() -> int:
    """Write the page to the file that is named, or print it."""
    page = configuration_page()
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(page, encoding="utf-8")
    else:
        print(page, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
