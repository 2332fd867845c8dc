"""`collie plugins`: what is installed (from metadata alone), what one plugin is, which are broken, and a new one."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collie_core.errors import PluginError
from collie_core.hookspecs import KINDS
from collie_core.plugins import CORE, Entry, Plugins, broken, near, normalise
from collie_core.scaffold import KINDS as NEW_KINDS
from collie_core.scaffold import write_package

if TYPE_CHECKING:
    from pydantic import BaseModel

_SHOWN = (*KINDS, "hooks", "commands")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("--check", action="store_true", help="import every plugin and say which are broken")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(act=_overview)
    actions = parser.add_subparsers(metavar="show NAME | new KIND NAME")
    show = actions.add_parser("show", description="Explain one plugin.", allow_abbrev=False)
    show.add_argument("name", metavar="NAME", help="as in the configuration, or distribution:name")
    show.add_argument("--kind", choices=_SHOWN, help="needed when several kinds have the name")
    show.add_argument("--trace", action="store_true", help="import all of it; where it fails, the full traceback")
    # SUPPRESS: or the default of the inner parser would undo `collie plugins --json show NAME`
    show.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")
    show.set_defaults(act=_show)
    new = actions.add_parser("new", description="Write a package with a plugin that works, to change.")
    new.add_argument("new_kind", metavar="KIND", choices=NEW_KINDS, help=", ".join(NEW_KINDS))
    new.add_argument("new_name", metavar="NAME", help="what the configuration will call it; of a model its model_type")
    new.add_argument("--output", type=Path, metavar="DIR", help="where to (default: ./collie-NAME)")
    new.set_defaults(act=_new)


def run(args: argparse.Namespace) -> int:
    """Exit code: 1 when a plugin that was asked for is broken."""
    code: int = args.act(args)
    return code


def _overview(args: argparse.Namespace) -> int:
    plugins = Plugins.discover()
    return _check(plugins, args.json) if args.check else _list(plugins, args.json)


# -- a new one ----------------------------------------------------------------------------------------------


def _new(args: argparse.Namespace) -> int:
    folder = args.output or Path(f"collie-{normalise(args.new_name)}")
    for path in write_package(args.new_kind, args.new_name, folder):
        print(path)
    print(f"\nnext: pip install -e {folder}, then collie check {args.new_kind} {args.new_name}")
    return 0


# -- the list -----------------------------------------------------------------------------------------------


def _list(plugins: Plugins, as_json: bool) -> int:
    entries = sorted((*plugins.entries, *plugins.blocked))
    rows = [{**asdict(entry), "summary": _summary(plugins, entry), "state": plugins.state(entry)} for entry in entries]
    if as_json:
        _print_json(rows)
    else:
        _print_table(("kind", "name", "distribution", "version", "summary"), map(_with_state, rows))
    return 0


def _summary(plugins: Plugins, entry: Entry) -> str:
    """That of the distribution; of the core's own components, whose descriptions import nothing, their own."""
    if entry.distribution == CORE and entry.kind in KINDS:
        return plugins.component(entry.kind, entry.qualified).summary
    return entry.summary


def _with_state(row: Mapping[str, str]) -> dict[str, str]:
    return {**row, "summary": f"[{row['state']}]" if row["state"] else row["summary"]}


def _print_table(columns: Sequence[str], rows: Iterable[Mapping[str, str]]) -> None:
    lines = [[row[column] for column in columns] for row in rows]
    if not lines:
        print("no plugins")
        return
    widths = [max(map(len, column)) for column in zip(columns, *lines, strict=True)]
    for line in ([column.upper() for column in columns], *lines):
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip())


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


# -- the check ----------------------------------------------------------------------------------------------


def _check(plugins: Plugins, as_json: bool) -> int:
    rows = [{**asdict(entry), **_verdict(plugins, entry)} for entry in plugins.entries]
    rows += [{**asdict(entry), "ok": None, "state": "blocked", "error": ""} for entry in plugins.blocked]
    rows.sort(key=lambda row: (row["kind"], row["name"], row["distribution"]))
    if as_json:
        _print_json(rows)
    else:
        _print_table(("kind", "name", "distribution", "version", "state"), rows)
        for row in rows:
            if row["error"]:
                print(f"\n{row['error']}")
    return 1 if any(row["ok"] is False for row in rows) else 0


def _verdict(plugins: Plugins, entry: Entry) -> dict[str, Any]:
    try:
        plugins.check(entry)
    except PluginError as error:
        return {"ok": False, "state": "✗ broken", "error": str(error)}
    return {"ok": True, "state": "ok", "error": ""}


# -- one plugin ---------------------------------------------------------------------------------------------


def _show(args: argparse.Namespace) -> int:
    plugins = Plugins.discover()
    entry = _find(plugins, args.name, args.kind)
    try:
        if args.trace:
            plugins.check(entry)
        facts = _facts(plugins, entry)
    except PluginError as error:
        if not args.trace:
            raise
        import traceback

        traceback.print_exception(error, file=sys.stderr)
        return 1
    if args.json:
        _print_json(facts)
    else:
        _print_facts(facts)
    return 0


def _find(plugins: Plugins, name: str, kind: str | None) -> Entry:
    """The entry of that name; the kind is needed only where several kinds have it."""
    if kind is not None:
        return plugins.find(kind, name)
    short = normalise(name.rpartition(":")[2])
    everything = (*plugins.entries, *plugins.blocked)
    kinds = sorted({entry.kind for entry in everything if entry.name == short})
    if len(kinds) > 1:
        raise PluginError(f"{name!r} is the name of several kinds of plugin: add --kind {'|'.join(kinds)}")
    if not kinds:
        known = {entry.name for entry in everything}
        raise PluginError(f"no plugin is called {name!r}.{near(short, known)} collie plugins lists them all.")
    return plugins.find(kinds[0], name)


def _facts(plugins: Plugins, entry: Entry) -> dict[str, Any]:
    """All that is known of a plugin before it is built."""
    facts: dict[str, Any] = asdict(entry)
    if entry.kind in KINDS:
        component = plugins.component(entry.kind, entry.qualified)
        model = plugins.config_model(entry.kind, entry.qualified)
        facts["summary"] = component.summary or entry.summary
        facts |= {"api": component.api, "build": component.build, "config": component.config}
        facts |= {
            "hint": component.hint,
            "capabilities": asdict(component.can),
            "fields": _fields(entry, model),
        }
    return facts


def _fields(entry: Entry, model: type[BaseModel]) -> dict[str, dict[str, Any]]:
    """The fields of the config less `type`, as JSON Schema sees them."""
    from pydantic import PydanticUserError

    try:
        schema = model.model_json_schema()
    except PydanticUserError as error:  # a field of a type that JSON cannot express
        raise broken(entry, f"{model.__name__} has no JSON Schema: {error}") from error
    required = schema.get("required", [])
    return {
        name: {"required": name in required, **properties}
        for name, properties in schema["properties"].items()
        if name != "type"
    }


def _print_facts(facts: Mapping[str, Any]) -> None:
    print(f"{facts['kind']} {facts['name']}: {facts['summary'] or 'no summary'}")
    origin = {"from": f"{facts['distribution']} {facts['version']}", "entry point": facts["value"]}
    described = {key: facts[key] for key in ("build", "config", "api", "hint") if facts.get(key)}
    _print_pairs(origin | described)
    for section, as_text in (("capabilities", str), ("fields", _field_line)):
        if facts.get(section):
            print(section)
            _print_pairs({name: as_text(value) for name, value in facts[section].items()})


def _print_pairs(pairs: Mapping[str, Any]) -> None:
    width = max(map(len, pairs))
    for name, value in pairs.items():
        print(f"  {name.ljust(width)}  {value}")


def _field_line(field: Mapping[str, Any]) -> str:
    default = json.dumps(field["default"]) if "default" in field else "..."  # "...": computed by the plugin
    start = "required" if field["required"] else f"= {default}"
    return f"{start}  {field.get('description', '')}".rstrip()
