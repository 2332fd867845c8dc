"""Which checkpoint a run goes on from. This file needs the standard library only."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from collie_core.checkpoint import files
from collie_core.checkpoint.files import CheckpointError
from collie_core.checkpoint.mirror import Mirror
from collie_core.report.rundir import CHECKPOINTS
from collie_core.storage import is_url

AUTO = "auto"

T = TypeVar("T")

logger = logging.getLogger("collie")


def choose(wanted: str, folder: Path, mirror: Mirror | None = None) -> Path | None:
    """The checkpoint that `checkpoint.resume_from_checkpoint` means, proved to be sound; None: begin.

    Args:
        wanted: auto, a checkpoint, or a run that has some: folders, or URLs.
        folder: of the checkpoints of this run; what comes from a store is put there.
        mirror: where this run keeps its checkpoints as well.

    Raises:
        CheckpointError: there is none where one is asked for, or none that is sound; or this run has gone on from it.
    """
    if wanted == AUTO:
        return newest_sound(folder) if mirror is None else _newest_of_both(folder, mirror)
    if is_url(wanted):
        return _from_store(wanted, folder)
    path = Path(wanted)
    if files.step_of(path) is None:
        found = newest_sound(path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path)
        if found is None:
            raise _holds_none(wanted)
        return found
    _require_newest(wanted, files.verify(path).step, folder, here=path.resolve().parent == folder.resolve())
    return path


def _newest_of_both(folder: Path, mirror: Mirror) -> Path | None:
    """From the store only what is newer than anything sound here."""
    here = newest_sound(folder)
    step = -1 if here is None else files.step_of(here) or 0
    return _newest_in_store(mirror, [one for one in mirror.steps() if one > step], folder) or here


def _from_store(url: str, folder: Path) -> Path:
    mirror, step = Mirror.at(url)
    if step is not None:
        _require_newest(url, step, folder, here=True)
        return mirror.get(step, folder)
    for place in (mirror, Mirror(f"{mirror.url}/{CHECKPOINTS}")):
        if found := _newest_in_store(place, place.steps(), folder):
            return found
    raise _holds_none(url)


def _newest_in_store(mirror: Mirror, steps: Iterable[int], folder: Path) -> Path | None:
    """Raises CheckpointError: there are some, and none is sound."""
    return _first_sound(steps, lambda step: mirror.get(step, folder), mirror.url)


def _require_newest(wanted: str, step: int, folder: Path, *, here: bool) -> None:
    later = [one.name for one in files.checkpoints_in(folder) if (files.step_of(one) or 0) > step]
    if here and later:
        raise CheckpointError(
            f"checkpoint.resume_from_checkpoint={wanted}: the run has gone on to {later[0]}; choose another "
            "train.output_dir to go another way from here, or delete the later checkpoints"
        )


def _holds_none(wanted: str) -> CheckpointError:
    return CheckpointError(f"checkpoint.resume_from_checkpoint={wanted} holds no checkpoint")


def newest_sound(folder: Path) -> Path | None:
    """None when there is none at all.

    Raises:
        CheckpointError: there are some, and none is sound.
    """

    def verified(path: Path) -> Path:
        files.verify(path)
        return path

    return _first_sound(files.checkpoints_in(folder), verified, str(folder))


def _first_sound(found: Iterable[T], prove: Callable[[T], Path], where: str) -> Path | None:
    """The first that `prove` gives; what it says of those before is logged."""
    problems = []
    for one in found:
        try:
            path = prove(one)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            logger.warning("%s; going on from %s", problem, path.name)
        return path
    if problems:
        raise CheckpointError(f"no checkpoint in {where} is sound: {'; '.join(problems)}")
    return None
