"""check that a plugin keeps what its kind promises"""

from __future__ import annotations

import argparse
import json
from typing import Any

from collie_core.api import PluginError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which plugin, and how deep."""
    parser.add_argument("kind", metavar="KIND", help="model, optimizer, adapter, metric, server, or another kind")
    parser.add_argument("name", metavar="NAME", help="as in the configuration, or distribution:name")
    parser.add_argument("--level", type=int, choices=range(4), default=3, metavar="N", help="the deepest level to run: "
                        "0 package, 1 one process, 2 several processes, 3 GPU (default: 3)")  # fmt: skip
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="a field of its section")
    parser.add_argument("--known", action="append", default=[], metavar="CHECK=REASON", help="a check that it fails, "
                        "and why; when it passes, that is a failure")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Exit code: 1 when a check fails."""
    from collie_core.api import quiet_libraries
    from collie_testkit.context import Material
    from collie_testkit.results import FAILED, own_checks, run_all

    options = {key: _value(text) for key, text in map(_pair, args.set)}
    quiet_libraries()
    rows = []
    for result in run_all(args.kind, args.name, Material(options=options), dict(map(_pair, args.known)), args.level):
        row = {
            "check": result.check.name,
            "level": result.check.level,
            "outcome": result.outcome,
            "reason": result.reason,
            "demand": result.check.demand,
        }
        rows.append(row)
        if not args.json:
            print(_line(row), flush=True)
    failed = sum(row["outcome"] == FAILED for row in rows)
    if args.json:
        print(json.dumps({"kind": args.kind, "name": args.name, "failed": failed, "checks": rows}, indent=2))
    else:
        print(f"{args.kind} {args.name}: {failed} of {len(rows)} checks failed. {own_checks(args.kind)}".rstrip())
    return 1 if failed else 0


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise PluginError(f"{text!r} must be written as NAME=VALUE")
    return key, value


def _value(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise PluginError(f"{text!r} is no YAML value") from error


def _line(row: dict[str, Any]) -> str:
    """One row of the table; what was found stands below what was demanded."""
    from collie_testkit.registry import LEVELS

    line = f"{row['outcome']:<14} {row['level']} {LEVELS[row['level']]:<17} {row['check']:<16} {row['demand']}"
    return line + (f"\n{'':<14} {row['reason']}" if row["reason"] else "")
