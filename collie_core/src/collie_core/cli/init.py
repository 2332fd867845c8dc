"""`collie init`: a commented configuration to start from."""

from __future__ import annotations

import argparse
from pathlib import Path

from collie_core.errors import RunError

PRESETS = ("quickstart", "finetune", "lora", "pretrain")  # here so that --help imports nothing
SCHEMA_FILE = "collie.schema.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to, and what kind of run."""
    parser.add_argument("path", nargs="?", type=Path, default=Path("run.yaml"), help="default: %(default)s")
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="quickstart",
        help="quickstart: a tiny llama from random weights, on a CPU; finetune: all weights of a pretrained "
        "model; lora: a few added ones; pretrain: a small llama, on text (default: %(default)s)",
    )
    parser.add_argument("--force", action="store_true", help="replace the file when there is one")


def run(args: argparse.Namespace) -> int:
    """Write the file and say what to type next."""
    from collie_core.config.presets import PRESETS, render

    path: Path = args.path / "run.yaml" if args.path.is_dir() else args.path
    text = render(args.preset)
    if path.with_name(SCHEMA_FILE).is_file():  # then editors complete without any setting of theirs
        text = f"# yaml-language-server: $schema={SCHEMA_FILE}\n{text}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w" if args.force else "x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        if isinstance(error, FileExistsError) and path.exists():
            raise RunError(f"{path} is there already: give another name, or --force to replace it") from None
        raise RunError(f"cannot write {path}: {error.strerror}") from error
    print(f"wrote {path} ({args.preset})")
    print(f"  1. {PRESETS[args.preset].data_hint}")
    print(f"  2. collie validate {path}")
    print(f"  3. collie train {path}")
    return 0
