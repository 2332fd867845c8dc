"""`collie schema`: the JSON Schema of the configuration, with the sections of all installed plugins."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from collie_core.errors import RunError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to write it."""
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write to FILE instead of standard output")


def run(args: argparse.Namespace) -> int:
    """Print or write the schema."""
    from collie_core.config.schema import json_schema
    from collie_core.plugins import Plugins

    text = json.dumps(json_schema(Plugins.discover()), indent=2, ensure_ascii=False)
    if args.output is None:
        print(text)
        return 0
    try:
        args.output.write_text(f"{text}\n", encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write {args.output}: {error.strerror}") from error
    print(f"wrote {args.output}; an editor with YAML support uses it when the first line of a configuration is")
    print(f"# yaml-language-server: $schema={args.output.name}")
    return 0
