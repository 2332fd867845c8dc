"""The places that a run writes to: whether it may, how fast they are, and whether locks and renaming work there."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from collie_core.doctor.finding import Finding, error, ok, warning
from collie_core.report.text import memory
from collie_core.storage import user_cache

WRITTEN = 2**25  # bytes
SLOW = 30e6  # bytes per second
SLOW_SYNC_S = 0.2
NETWORK = ("nfs", "cifs", "smb", "fuse", "lustre", "gpfs", "beegfs", "ceph", "9p", "glusterfs", "afs")


def places() -> dict[str, tuple[Path, int]]:
    """What lies where, and how many bytes should be free there."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return {
        "runs": (Path("runs"), 10 * 2**30),
        "models of the hub": (Path(HF_HUB_CACHE), 10 * 2**30),
        "tokenised data": (user_cache("datasets"), 2**30),
        "temporary files": (Path(tempfile.gettempdir()), 2**30),
    }


def check() -> Iterator[Finding]:
    """Each place, in the nearest folder above it that exists."""
    for name, (path, wanted) in places().items():
        yield from examined(name, path, wanted)


def examined(name: str, path: Path, wanted: int) -> Iterator[Finding]:
    """What a place is like, and everything that is wrong with it.

    Args:
        name: what lies there.
        path: may not exist yet.
        wanted: bytes that should be free.
    """
    folder = next(above for above in (path.absolute(), *path.absolute().parents) if above.is_dir())
    kind, free = file_system(folder), shutil.disk_usage(folder).free
    text = f"{name} in {path}: {kind}, {memory(free)} free"
    try:
        rate, sync_s = _speed(folder, min(WRITTEN, free // 2))
        broken = _broken(folder)
    except OSError as failure:
        yield error(f"{text}; cannot be written: {failure.strerror}", "make it writable, or choose another folder")
        return
    text += f", writes {rate / 1e6:,.0f} MB/s, a small file is safe in {1000 * sync_s:.1f} ms"
    complaints = list(_complaints(name, kind, free, wanted, rate, sync_s))
    yield warning(f"{text}; {complaints[0][0]}", complaints[0][1]) if complaints else ok(text)
    for what, way_out in complaints[1:]:
        yield warning(f"{name} in {path}: {what}", way_out)
    for what in broken:
        yield error(f"{name} in {path}: {what}", "choose a folder on another file system")


def _complaints(name: str, kind: str, free: int, wanted: int, rate: float, sync_s: float) -> Iterator[tuple[str, str]]:
    if free < wanted:
        yield f"less than {memory(wanted)} free", "make room, or choose another folder"
    if kind == "tmpfs" and name == "runs":
        yield "it lies in memory and is lost when the machine stops", "choose a folder on a disk"
    if kind.startswith(NETWORK) and name == "tokenised data":
        yield "it is on the network, where maps of files are slow", "set data.cache_dir to a local folder"
    if rate < SLOW or sync_s > SLOW_SYNC_S:
        yield "it is slow", "choose a faster disk, or save less often with checkpoint.save_steps"


def file_system(folder: Path) -> str:
    """Its type, as the system names it."""
    import psutil  # type: ignore[import-untyped]

    whole = folder.resolve()
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    return next((mounts[above] for above in (whole, *whole.parents) if above in mounts), "unknown")


def _speed(folder: Path, size: int) -> tuple[float, float]:
    """Bytes per second of one file until it is on the disk, and seconds of one of a few bytes."""
    block = os.urandom(2**20)  # what compresses well would flatter some file systems
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".collie-doctor-") as file:
        began = time.perf_counter()
        for _ in range(max(1, size >> 20)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        rate = max(1, size >> 20) * len(block) / (time.perf_counter() - began)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".collie-doctor-") as file:
        began = time.perf_counter()
        file.write(b"collie")
        file.flush()
        os.fsync(file.fileno())
        return rate, time.perf_counter() - began


def _broken(folder: Path) -> Iterator[str]:
    """Promises of a file system that checkpoints and caches rely on, and this one does not keep."""
    from filelock import FileLock, Timeout

    with tempfile.TemporaryDirectory(dir=folder, prefix=".collie-doctor-") as made:
        first, second = Path(made) / "first", Path(made) / "second"
        with FileLock(f"{made}/lock"):
            try:
                with FileLock(f"{made}/lock", timeout=0):
                    yield "locks do not keep others out"
            except Timeout:
                pass  # as it should be
        first.write_text("new", encoding="ascii")
        second.write_text("old", encoding="ascii")
        os.replace(first, second)
        if first.exists() or second.read_text(encoding="ascii") != "new":
            yield "a file cannot take the place of another at once"
        (Path(made) / "folder").mkdir()
        os.rename(Path(made) / "folder", Path(made) / "renamed")
        if not (Path(made) / "renamed").is_dir():
            yield "folders cannot be renamed"
