"""The folders of checkpoints: written whole or not at all, proved by a manifest, deleted in order.

`<output_dir>/checkpoints/step-00000100` appears under its name when everything in it is on the disk, the manifest
with the size and digest of each file last. Hidden folders beside it are leftovers of writers that were interrupted.
This file needs the standard library only.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

from collie_core.errors import RunError

MANIFEST = "manifest.json"
TRAINER = "trainer.json"  # step, position in the data, schedule: all that is no tensor
STATES = "optimizer.safetensors"  # per parameter, `<parameter>/<state>`
MODEL = "model"  # the weights, or the adapter, as an export has them
FORMAT = 1

_NAME = re.compile(r"step-(\d{8,})")
_CHUNK = 1 << 20  # bytes that are hashed at a time
_LEFTOVER = re.compile(r"\.step-\d+\.(new|old)")


class CheckpointError(RunError):
    """A checkpoint cannot be used; says which and why."""


def folder_name(step: int) -> str:
    """The name of the checkpoint after so many steps."""
    return f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step of a checkpoint, by its name; None when it is none."""
    found = _NAME.fullmatch(folder.name)
    return int(found[1]) if found else None


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a folder, the newest first; whether they are sound is not looked at."""
    if not folder.is_dir():
        return []
    found = [(step, path) for path in folder.iterdir() if path.is_dir() and (step := step_of(path)) is not None]
    return [path for _, path in sorted(found, reverse=True)]


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself."""

    step: int
    version: str  # of collie-core
    created: str  # UTC
    files: dict[str, tuple[int, str]]  # path below the folder -> size in bytes and sha256

    @property
    def nbytes(self) -> int:
        """The size of all files."""
        return sum(size for size, _ in self.files.values())


def write_manifest(folder: Path, step: int, digests: Mapping[str, str]) -> None:
    """Bring every file of a folder to the disk, and then write what they are; `digests` are known already."""
    files = {}
    for path in _files(folder):
        _sync(path)
        name = str(path.relative_to(folder))
        files[name] = {"bytes": path.stat().st_size, "sha256": digests.get(name) or digest(path)}
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    facts = {"format": FORMAT, "step": step, "version": metadata.version("collie-core"), "created": created}
    (folder / MANIFEST).write_text(json.dumps({**facts, "files": files}, indent=2) + "\n", encoding="utf-8")
    for path in (folder / MANIFEST, *(below for below in folder.rglob("*") if below.is_dir()), folder):
        _sync(path)


def read_manifest(folder: Path) -> Manifest:
    """What a checkpoint says of itself.

    Raises:
        CheckpointError: there is no manifest, or it is damaged or of another format.
    """
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise CheckpointError(f"{path} has the format {found['format']}, and this version reads {FORMAT}")
        files = {str(name): (int(item["bytes"]), str(item["sha256"])) for name, item in found["files"].items()}
        manifest = Manifest(int(found["step"]), str(found["version"]), str(found["created"]), files)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {MANIFEST}: it was never finished, or is no checkpoint") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if manifest.step != step_of(folder):
        raise CheckpointError(f"{path} is that of step {manifest.step}")
    return manifest


def verify(folder: Path) -> Manifest:
    """Compare every file of a checkpoint with its manifest.

    Raises:
        CheckpointError: one is missing, damaged or too much; names it.
    """
    manifest = read_manifest(folder)
    there = {str(path.relative_to(folder)) for path in _files(folder)} - {MANIFEST}
    for name in sorted({TRAINER, STATES, *manifest.files} - there):
        raise CheckpointError(f"{folder} is damaged: {name} is missing")
    for name in sorted(there - set(manifest.files)):
        raise CheckpointError(f"{folder} is damaged: {name} does not belong to it")
    for name, (size, _) in manifest.files.items():
        found = (folder / name).stat().st_size
        if found != size:
            raise CheckpointError(f"{folder} is damaged: {name} has {found} of {size} bytes")
    with ThreadPoolExecutor() as threads:  # hashing leaves the interpreter to others
        digests = threads.map(lambda name: digest(folder / name), manifest.files)
        for (name, (_, expected)), actual in zip(manifest.files.items(), digests, strict=True):
            if actual != expected:
                raise CheckpointError(f"{folder} is damaged: {name} is not what was written (sha256)")
    return manifest


def digest(path: Path) -> str:
    """The sha256 of a file."""
    found, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            found.update(buffer[:size])
    return found.hexdigest()


def begin(parent: Path, step: int) -> Path:
    """A new hidden folder for a checkpoint; what interrupted writers have left behind goes."""
    parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(parent)
    beside = parent / f".{folder_name(step)}.new"
    beside.mkdir()
    return beside


def commit(beside: Path, step: int, digests: Mapping[str, str] = MappingProxyType({})) -> Path:
    """Write the manifest and give the folder its name. One that has it already is no longer needed then."""
    write_manifest(beside, step, digests)
    final = beside.with_name(folder_name(step))
    old = _hidden(final)
    if final.exists():
        final.rename(old)
    beside.rename(final)
    _sync(final.parent)
    if old.exists():
        shutil.rmtree(old)
    return final


def prune(parent: Path, keep: int, *, thorough: bool = False, spare: int | None = None) -> list[Path]:
    """Delete all checkpoints older than the `keep` newest sound ones, and give them back.

    What has no manifest, or with `thorough` is damaged, does not count: the last sound one always stays, and so does
    the one of step `spare`.
    """
    removed, sound = [], 0
    for folder in checkpoints_in(parent):
        if sound >= keep and step_of(folder) != spare:
            _remove(folder)
            removed.append(folder)
            continue
        try:
            verify(folder) if thorough else read_manifest(folder)
        except CheckpointError:
            continue
        sound += 1
    return removed


def remove_leftovers(parent: Path) -> list[Path]:
    """Delete what interrupted writers have left behind, and give it back."""
    found = [path for path in parent.iterdir() if _LEFTOVER.fullmatch(path.name)] if parent.is_dir() else []
    for path in found:
        shutil.rmtree(path)
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return found


def _remove(folder: Path) -> None:
    """First out of sight, so that one that is half deleted is never taken for a checkpoint."""
    folder.rename(_hidden(folder))
    shutil.rmtree(_hidden(folder))


def _hidden(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if not path.is_dir())


def _sync(path: Path) -> None:
    """Wait until a file, or the list of files in a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
