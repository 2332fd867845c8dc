"""`collie merge --adapter DIR --out DIR`: one model of an adapter and its base model, in folders or at URLs."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folders, and whether to compare."""
    parser.add_argument("--base", default="", metavar="DIR", help="the base model; default: the one the adapter names")
    parser.add_argument("--adapter", required=True, metavar="DIR", help="the adapter, a folder or URL")
    parser.add_argument("--out", required=True, metavar="DIR", help="where to write the merged model")
    parser.add_argument(
        "--verify", action="store_true", help="compare its logits with those of the base model with the adapter on it"
    )


def run(args: argparse.Namespace) -> int:
    """Write the model."""
    from collie_core import storage
    from collie_core.errors import RunError

    to_store = storage.is_url(args.out)
    if storage.exists(args.out) if to_store else Path(args.out).exists():
        raise RunError(f"{args.out} exists already; name another folder with --out")
    from collie_core.cli._quiet import quiet_libraries
    from collie_core.model.merge import merge_adapter
    from collie_core.plugins import Plugins

    quiet_libraries()
    adapter = Path(storage.local_folder(args.adapter))
    with tempfile.TemporaryDirectory(prefix="collie-merge-") as beside:
        out = Path(beside) / "model" if to_store else Path(args.out)
        merge_adapter(adapter, out, Plugins.discover(), base=args.base, verify=args.verify)
        if to_store:
            storage.put_folder(out, args.out, last="config.json")
    print(f"{args.out}{': its logits are those of the adapter' if args.verify else ''}")
    return 0
