"""What every verb with a configuration shares: `CONFIG [key=value ...] [--key value | --key=value ...]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collie_core.config.run import RunConfig

_USAGE = "CONFIG [key=value ...] [--key value ...]"


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """The file, and overrides of its keys; they arrive as `args.config` and `args.overrides`."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML file")
    parser.epilog = (
        "Any key of the file can be set behind it: train.max_steps=10, --train.max_steps=10 and "
        "--train.max_steps 10 are the same; an item of a list has its index, as in data.train.0.weight=2."
    )
    parse = parser.parse_known_args

    def parse_with_overrides(
        args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        known, rest = parse(args, namespace)
        known.overrides = list(_overrides(rest, parser))
        return known, []

    # argparse has no notion of free keys: what it does not know is ours, instead of an error.
    parser.parse_known_args = parse_with_overrides  # type: ignore[method-assign, assignment]


def add_nproc_argument(parser: argparse.ArgumentParser) -> None:
    """The number of processes to start here; it arrives as `args.nproc`."""
    parser.add_argument(
        "--nproc",
        type=int,
        metavar="N",
        help="processes to start on this machine (default: one per GPU; without GPUs as few as `parallel:` needs)",
    )


def _overrides(rest: Sequence[str], parser: argparse.ArgumentParser) -> Iterator[str]:
    words = iter(rest)
    for word in words:
        key = word.removeprefix("--")
        if "=" in key:
            yield key
        elif key == word:
            parser.error(f"{word!r} is no override: write key=value. Usage: {_USAGE}")
        else:
            value = next(words, None)
            if value is None or value.startswith("--"):
                parser.error(f"{word} needs a value: {word} VALUE or {key}=VALUE")
            yield f"{key}={value}"


def load_config(args: argparse.Namespace, *, complete: bool = False) -> RunConfig:
    """The configuration that the command line means; notes about names of other tools go to stderr.

    Args:
        complete: refuse a file without a model or without training data.

    Raises:
        ConfigError: everything that is wrong, at once.
    """
    from collie_core.config.run import RunConfig

    notes: list[str] = []
    config = RunConfig.from_yaml(args.config, args.overrides, notes=notes, complete=complete)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return config
