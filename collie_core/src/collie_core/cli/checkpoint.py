"""`collie checkpoint list|verify|prune DIR`: the checkpoints of a run, in a folder or a store."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from collie_core import storage
from collie_core.checkpoint import files
from collie_core.checkpoint.files import CheckpointError, Manifest
from collie_core.checkpoint.mirror import Mirror
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
    parser.add_argument("folder", help="a run, its folder of checkpoints, or one checkpoint (verify); a folder or URL")
    parser.add_argument("--keep", type=int, default=1, metavar="N", help="prune: how many stay (default: 1)")


def run(args: argparse.Namespace) -> int:
    """Exit code: 1 when a checkpoint is damaged."""
    found = _InStore(args.folder) if storage.is_url(args.folder) else _InFolder(Path(args.folder))
    if not found.steps:
        raise RunError(f"{args.folder} holds no checkpoint")
    if args.what == "prune":
        return _prune(found, args.keep)
    return max(_show(found, step, thorough=args.what == "verify") for step in reversed(found.steps))


class _InFolder:
    """The checkpoints of a folder, the newest first."""

    def __init__(self, folder: Path) -> None:
        step = files.step_of(folder)
        self.single = step is not None
        below = folder / CHECKPOINTS if (folder / CHECKPOINTS).is_dir() else folder
        self.folder = folder.parent if self.single else below
        there = [folder] if self.single and folder.is_dir() else [] if self.single else files.checkpoints_in(below)
        self.steps = [step for path in there if (step := files.step_of(path)) is not None]

    def manifest(self, step: int, *, thorough: bool) -> Manifest:
        path = self.folder / files.folder_name(step)
        return files.verify(path) if thorough else files.read_manifest(path)

    def prune(self, keep: int) -> Iterable[str]:
        removed = [*files.remove_leftovers(self.folder), *files.prune(self.folder, keep, thorough=True)]
        return [path.name for path in removed]


class _InStore:
    """The same in a store; what has no manifest is no checkpoint there."""

    def __init__(self, url: str) -> None:
        self.mirror, step = Mirror.at(url)
        self.single = step is not None
        self.steps = self.mirror.steps()
        if not self.steps and not self.single:
            self.mirror = Mirror(f"{self.mirror.url}/{CHECKPOINTS}")
            self.steps = self.mirror.steps()
        if self.single:
            self.steps = [one for one in self.steps if one == step]

    def manifest(self, step: int, *, thorough: bool) -> Manifest:
        return self.mirror.verify(step) if thorough else self.mirror.manifest(step)

    def prune(self, keep: int) -> Iterable[str]:
        removed = [*self.mirror.remove_leftovers(), *self.mirror.prune(keep, thorough=True)]
        return map(files.folder_name, removed)


def _show(found: _InFolder | _InStore, step: int, *, thorough: bool) -> int:
    name = files.folder_name(step)
    try:
        manifest = found.manifest(step, thorough=thorough)
    except CheckpointError as error:
        print(f"{name}  {error}")
        return 1 if thorough else 0
    sound = "  sound" if thorough else ""
    print(f"{name}  {memory(manifest.nbytes):>9}  {manifest.created}  collie {manifest.version}{sound}")
    return 0


def _prune(found: _InFolder | _InStore, keep: int) -> int:
    if found.single or keep < 1:
        why = "a checkpoint is given, and a run is wanted" if found.single else f"--keep {keep} must be at least 1"
        raise RunError(f"collie checkpoint prune: {why}")
    removed = list(found.prune(keep))
    for name in removed:
        print(f"deleted {name}")
    if not removed:
        print("nothing to delete")
    return 0
