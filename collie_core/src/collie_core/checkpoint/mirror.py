"""The checkpoints of a run in an object store: `<url>/step-00000100/`, proved by the manifest as those on a disk are.

A store cannot rename, so the manifest is what makes a checkpoint: it is written last and deleted first.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from collie_core.checkpoint import files
from collie_core.checkpoint.files import MANIFEST, CheckpointError, Manifest
from collie_core.storage import Place, StorageNameError, put_folder, user_cache


class Mirror:
    """Args:
    url: the folder of the checkpoints. One process may write to it at a time, any number may read.

    Every method raises `StorageError` when the store cannot be reached.
    """

    def __init__(self, url: str) -> None:
        self._place = Place(url)
        self.url = self._place.url

    @classmethod
    def at(cls, url: str) -> tuple[Mirror, int | None]:
        """The mirror that a URL leads to, and the step when it is that of one checkpoint."""
        parent, _, name = url.rstrip("/").rpartition("/")
        step = files.step_of(Path(name))
        return (cls(url), None) if step is None else (cls(parent), step)

    def steps(self) -> list[int]:
        """The steps of the checkpoints, the newest first; those that were never finished are none."""
        return sorted((step for step, names in self._listed().items() if MANIFEST in names), reverse=True)

    def put(self, folder: Path) -> str:
        """Copy a checkpoint here, in place of one of the same step; gives its URL."""
        step = files.read_manifest(folder).step
        self.remove(step)
        put_folder(folder, self.url_of(step), last=MANIFEST)
        return self.url_of(step)

    def get(self, step: int, into: Path) -> Path:
        """A sound copy as `into/step-...`; what is there and sound is not fetched again.

        Any number of processes may call this at once: one of them fetches, the others of the machine wait for it.

        Raises:
            CheckpointError: there is none of that step, or it is damaged; `into` is as it was then.
        """
        from filelock import FileLock

        final = into / files.folder_name(step)
        locks = user_cache("stores")
        locks.mkdir(parents=True, exist_ok=True)
        with FileLock(locks / f"{hashlib.sha256(str(final.resolve()).encode()).hexdigest()[:32]}.lock"):
            if _is_sound(final):
                return final
            hidden = into / f".{final.name}.new"  # removed by `files.remove_leftovers` if this process is killed
            shutil.rmtree(hidden, ignore_errors=True)
            try:
                self._fetch(step, hidden / final.name)
                if final.exists():
                    shutil.rmtree(final)
                (hidden / final.name).rename(final)
            finally:
                shutil.rmtree(hidden, ignore_errors=True)
        return final

    def manifest(self, step: int) -> Manifest:
        """What a checkpoint says of itself.

        Raises:
            CheckpointError: it has no manifest, or a damaged one.
        """
        with tempfile.TemporaryDirectory(prefix="collie-") as root, self._named(step, Path(root)) as folder:
            folder.mkdir()
            with suppress(StorageNameError):  # there is none, which `read_manifest` says
                (folder / MANIFEST).write_bytes(self._place.read(f"{folder.name}/{MANIFEST}"))
            return files.read_manifest(folder)

    def verify(self, step: int) -> Manifest:
        """Compare every byte of a checkpoint with its manifest, without keeping any.

        Raises:
            CheckpointError: a file is missing, damaged or too much; names it.
        """
        manifest, url = self.manifest(step), self.url_of(step)
        there = self._listed().get(step, set()) - {MANIFEST}
        for name in sorted(manifest.files.keys() - there):
            raise CheckpointError(f"{url} is damaged: {name} is missing")
        for name in sorted(there - manifest.files.keys()):
            raise CheckpointError(f"{url} is damaged: {name} does not belong to it")
        for name, (size, expected) in manifest.files.items():
            found, length = hashlib.sha256(), 0
            for block in self._place.blocks(f"{files.folder_name(step)}/{name}"):
                found.update(block)
                length += len(block)
            if length != size:
                raise CheckpointError(f"{url} is damaged: {name} has {length} of {size} bytes")
            if found.hexdigest() != expected:
                raise CheckpointError(f"{url} is damaged: {name} is not what was written (sha256)")
        return manifest

    def prune(self, keep: int, *, thorough: bool = False, spare: int | None = None) -> list[int]:
        """Delete all checkpoints older than the `keep` newest sound ones, and give their steps back.

        With `thorough` what is damaged does not count as sound. The one of step `spare` always stays.
        """
        removed, sound = [], 0
        for step in self.steps():
            if sound >= keep and step != spare:
                self.remove(step)
                removed.append(step)
                continue
            try:
                if thorough:
                    self.verify(step)
            except CheckpointError:
                continue
            sound += 1
        return removed

    def remove(self, step: int) -> None:
        """Delete what there is of a checkpoint."""
        name, there = files.folder_name(step), self._listed().get(step, set())
        if MANIFEST in there:
            self._place.remove([f"{name}/{MANIFEST}"])
        self._place.remove([f"{name}/{file}" for file in sorted(there - {MANIFEST})])

    def remove_leftovers(self) -> list[int]:
        """Delete what interrupted uploads and deletions have left, and give the steps back; not while a run writes."""
        found = [step for step, names in self._listed().items() if MANIFEST not in names]
        for step in found:
            self.remove(step)
        return found

    def url_of(self, step: int) -> str:
        """Where the checkpoint of a step lies."""
        return f"{self.url}/{files.folder_name(step)}"

    def _listed(self) -> dict[int, set[str]]:
        """The files of each step, finished or not."""
        found: dict[int, set[str]] = {}
        for name in self._place.files():
            folder, _, file = name.partition("/")
            step = files.step_of(Path(folder))
            if step is not None and file:
                found.setdefault(step, set()).add(file)
        return found

    def _fetch(self, step: int, target: Path) -> None:
        with self._named(step, target.parent):
            place = Place(self.url_of(step))
            there = place.files()
            if MANIFEST not in there:
                raise CheckpointError(f"{target} has no {MANIFEST}: it was never finished, or is no checkpoint")
            place.get(there, target)
            files.verify(target)

    @contextmanager
    def _named(self, step: int, root: Path) -> Iterator[Path]:
        """A folder in `root` for the copy of a checkpoint. Raises CheckpointError: with the URL, not that folder."""
        folder = root / files.folder_name(step)
        try:
            yield folder
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(str(folder), self.url_of(step))) from error


def _is_sound(folder: Path) -> bool:
    try:
        files.verify(folder)
    except CheckpointError:
        return False
    return True
