"""Traps of the environment: what slows runs down, lets them hang, or makes them take a shell for a launcher."""

from __future__ import annotations

import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

from collie_core.doctor.devices import usable_cores
from collie_core.doctor.finding import Finding, error, ok, warning
from collie_core.report.text import memory

FEW_FILES = 4096
SMALL_SHM = 2**30
SLOWING = {
    "CUDA_LAUNCH_BLOCKING": "the host waits for every kernel",
    "NCCL_P2P_DISABLE": "GPUs exchange through the memory of the host",
    "NCCL_IB_DISABLE": "machines exchange without InfiniBand",
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "every tensor is allocated by the driver",
    "TORCH_SHOW_CPP_STACKTRACES": "every error collects a stack of C++",
}
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # LOCAL_RANK alone makes nobody wait


def check() -> Iterator[Finding]:
    """All traps; one line when there is none."""
    found = [*_variables(os.environ), *_limits(), *_shared_memory(), *stale_locks(*_extension_folders())]
    yield from found or [ok("no trap: variables, limits, shared memory and locks of compilers are as they should be")]


def _variables(environment: Mapping[str, str]) -> Iterator[Finding]:
    if set_ones := [name for name in LAUNCHED if name in environment]:
        yield error(
            f"{', '.join(set_ones)} {'is' if len(set_ones) == 1 else 'are'} set: a run takes this shell for a launcher "
            "and waits for other ranks",
            f"unset {' '.join(set_ones)}",
        )
    threads = environment.get("OMP_NUM_THREADS", "")
    if threads.isdecimal() and int(threads) > usable_cores():
        cores = max(1, int(usable_cores()))
        yield warning(f"OMP_NUM_THREADS={threads}, and there are {cores} cores", f"export OMP_NUM_THREADS={cores}")
    for name, what in SLOWING.items():
        if environment.get(name, "0") not in ("", "0"):
            yield warning(f"{name}={environment[name]}: {what}", f"unset {name}, unless you look for a fault")
    if environment.get("TORCH_DISTRIBUTED_DEBUG", "OFF").upper() != "OFF":
        yield warning("TORCH_DISTRIBUTED_DEBUG is on: collectives are checked", "unset TORCH_DISTRIBUTED_DEBUG")
    if (wanted := environment.get("TMPDIR")) and os.path.abspath(wanted) != os.path.abspath(tempfile.gettempdir()):
        yield warning(
            f"TMPDIR={wanted} cannot be written: temporary files go to {tempfile.gettempdir()}",
            "make it a folder that may be written and has room, or unset TMPDIR",
        )
    yield from _proxies(environment)


def _proxies(environment: Mapping[str, str]) -> Iterator[Finding]:
    def read(name: str) -> str:
        return environment.get(name) or environment.get(name.upper(), "")

    if read("http_proxy") and not {"localhost", "127.0.0.1", "*"} & {
        host.strip() for host in read("no_proxy").split(",")
    }:
        yield warning(
            "http_proxy is set and no_proxy does not leave out localhost: requests to this machine leave it",
            "export no_proxy=localhost,127.0.0.1",
        )


def _limits() -> Iterator[Finding]:
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < FEW_FILES:
        enough = most == resource.RLIM_INFINITY or most >= FEW_FILES
        way_out = f"ulimit -n {FEW_FILES}" if enough else "let an administrator raise the hard limit of open files"
        yield warning(f"a process may open {files} files: many workers or shards need more", way_out)
    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if space != resource.RLIM_INFINITY:
        yield error(
            f"a process may address {memory(space)} only, less than CUDA and mapped weights need", "ulimit -v unlimited"
        )
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if locked != resource.RLIM_INFINITY and Path("/sys/class/infiniband").is_dir():
        yield warning(f"a process may lock {memory(locked)}, and InfiniBand needs more", "ulimit -l unlimited")


def _shared_memory() -> Iterator[Finding]:
    if not Path("/dev/shm").is_dir():
        return
    size = shutil.disk_usage("/dev/shm").total
    if size < SMALL_SHM:
        yield warning(
            f"/dev/shm holds {memory(size)}: data.num_workers and NCCL need more, or die of a bus error",
            "start the container with --shm-size=8g or --ipc=host",
        )


def _extension_folders() -> list[Path]:
    """Where torch compiles extensions, as those of DeepSpeed; none where its locks cannot outlive their owners.

    They could until https://github.com/pytorch/pytorch/issues/189245 was solved with locks of the system.
    """
    torch = find_spec("torch")
    assert torch is not None
    assert torch.origin is not None
    source = Path(torch.origin).parent / "utils" / "cpp_extension.py"
    if "baton = FileBaton(" not in source.read_text(encoding="utf-8"):
        return []
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return [Path(os.environ.get("TORCH_EXTENSIONS_DIR") or f"{cache}/torch_extensions")]


def stale_locks(*folders: Path) -> Iterator[Finding]:
    """Locks of compilations below these folders that no process holds: whoever comes next waits for ever."""
    for folder in folders:
        for lock in sorted({*folder.glob("*/lock"), *folder.glob("*/*/lock")}):
            if not _is_open(lock):
                yield error(
                    f"{lock} was left by a compilation that was killed: DeepSpeed waits for it without end",
                    f"rm {lock}",
                )


def _is_open(path: Path) -> bool:
    """Whether a process that we may look at holds the file open (Linux; elsewhere none is seen to)."""
    if sys.platform != "linux":
        return False
    target = str(path.resolve())
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(link) == target:
                return True
        except OSError:  # it has ended, or is another user's
            continue
    return False
