"""`collie checkpoint list|verify|prune DIR`: the checkpoints of a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from collie_core.checkpoint import files
from collie_core.checkpoint.files import CheckpointError
from collie_core.errors import RunError
from collie_core.report.rundir import CHECKPOINTS
from collie_core.report.text import memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to do, and where."""
    parser.add_argument(
        "what",
        choices=["list", "verify", "prune"],
        help="list: each checkpoint with its size; verify: compare every file with what was written; "
        "prune: delete all but the newest sound ones, and what interrupted runs have left behind",
    )
    parser.add_argument("folder", type=Path, help="a run, its folder of checkpoints, or one checkpoint (verify)")
    parser.add_argument("--keep", type=int, default=1, metavar="N", help="prune: how many stay (default: 1)")


def run(args: argparse.Namespace) -> int:
    """Exit code: 1 when a checkpoint is damaged."""
    single = files.step_of(args.folder) is not None
    folder = args.folder / CHECKPOINTS if (args.folder / CHECKPOINTS).is_dir() else args.folder
    found = [args.folder] if single else files.checkpoints_in(folder)
    if not found or not found[0].is_dir():
        raise RunError(f"{args.folder} holds no checkpoint")
    if args.what == "prune":
        return _prune(folder, args.keep, single=single)
    return max(_show(path, thorough=args.what == "verify") for path in reversed(found))


def _show(path: Path, *, thorough: bool) -> int:
    try:
        manifest = files.verify(path) if thorough else files.read_manifest(path)
    except CheckpointError as error:
        print(f"{path.name}  {error}")
        return 1 if thorough else 0
    sound = "  sound" if thorough else ""
    print(f"{path.name}  {memory(manifest.nbytes):>9}  {manifest.created}  collie {manifest.version}{sound}")
    return 0


def _prune(folder: Path, keep: int, *, single: bool) -> int:
    if single or keep < 1:
        why = "a checkpoint is given, and a run is wanted" if single else f"--keep {keep} must be at least 1"
        raise RunError(f"collie checkpoint prune: {why}")
    removed = [*files.remove_leftovers(folder), *files.prune(folder, keep, thorough=True)]
    for path in removed:
        print(f"deleted {path.name}")
    if not removed:
        print("nothing to delete")
    return 0
