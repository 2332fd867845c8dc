"""A run that ran out of memory: what it held, what the plan had said, and what would have fitted."""

from __future__ import annotations

import getpass
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from collie_core.errors import CollieError, OutOfMemory
from collie_core.plan.held import held
from collie_core.plan.room import free_memory, ranks_of_this_machine
from collie_core.plan.show import parse_bytes
from collie_core.plan.ways_out import Request, as_json
from collie_core.report import text

if TYPE_CHECKING:
    from collie_core.config.run import RunConfig
    from collie_core.parts import Parts

PLANNING_S = 120.0  # for the ways out; a rank that waits for others this long is not yet taken to hang
_SIGNS = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+) (\w+)")  # torch: CUDACachingAllocator.cpp, alloc_cpu.cpp


@contextmanager
def explained(parts: Parts) -> Iterator[None]:
    """Inside, an error for lack of memory becomes one that says what to do.

    Raises:
        OutOfMemory: from the error.
    """
    try:
        yield
    except (MemoryError, RuntimeError, CollieError) as error:
        cause = _for_lack_of_memory(error)
        if cause is None:
            raise
        raise OutOfMemory(explanation(parts, cause)) from error


def _for_lack_of_memory(error: BaseException | None) -> BaseException | None:
    """The error, or what caused it, that memory was refused; None: it is about something else."""
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(sign in str(error) for sign in _SIGNS):
            return error
        error = error.__cause__
    return None


def explanation(parts: Parts, error: BaseException) -> str:
    """Several lines."""
    found = _ASKED.search(str(error))
    asked = parse_bytes(f"{found[1]} {found[2].replace('bytes', 'B')}") if found else 0
    gpu = parts.device.type == "cuda"
    free, there = _free(parts.device) if gpu else (free_memory(), "main memory")
    wanted = f"{text.memory(asked)} were asked for" if found else "more was asked for"
    lines = [f"out of memory: {wanted}, and {text.memory(free)} of {there} were free", _held_text(parts)]
    return "\n".join([*lines, *_advice(parts, max(0, asked - free), gpu=gpu)])


def _free(device: torch.device) -> tuple[int, str]:
    """Bytes that torch could still get of a GPU, if they were in one piece; and what the GPU is."""
    free, total = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + unused, f"the {text.memory(total)} of {torch.cuda.get_device_name(device)}"


def _held_text(parts: Parts) -> str:
    """What this rank holds by component; the rest is what is left of all that was allocated."""
    if parts.device.type == "cuda":
        most, rest = torch.cuda.max_memory_allocated(parts.device), "activations and temporary"
        line = f"this rank held {text.memory(most)} at the most"
    else:
        import psutil  # type: ignore[import-untyped]

        most, rest = psutil.Process().memory_info().rss, "activations, temporary, data and libraries"
        line = f"this process holds {text.memory(most)}"
    found = held_bytes(parts)
    found[rest] = max(0, most - sum(found.values()))
    return f"{line}: {', '.join(f'{name} {text.memory(nbytes)}' for name, nbytes in found.items() if nbytes)}"


def held_bytes(parts: Parts) -> dict[str, int]:
    """Bytes on the device of this rank by component; nothing before the model stands."""
    if "model" not in parts.__dict__:
        return {}
    found: dict[str, int] = {}
    known: set[int] = set()
    for component, tensors in held(parts):
        for tensor in tensors:
            if tensor is None or tensor.device.type != parts.device.type:
                continue
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                known.add(storage.data_ptr())
                found[component] = found.get(component, 0) + storage.nbytes()
    return found


def _advice(parts: Parts, short: int, *, gpu: bool) -> Iterator[str]:
    """What the plan says of the run, and what would make it fit."""
    if parts.given.model is not None:
        yield "no plan says what would fit, since the model was handed in"
        return
    sharing = 1 if gpu else ranks_of_this_machine()
    request = Request(_as_it_ran(parts), parts.topology.world_size, sharing, gpu, short)
    answers, failure = _planned(request, parts.config)
    if answers:
        yield f"the plan says {answers[0]}"
    if answers[1:]:
        yield "\n  ".join(["any of these would fit, by the plan:", *answers[1:]])
    elif failure:
        yield f"what would fit is not known: {failure}"
    else:
        yield "nothing was found that would fit: use more processes, an adapter, or an optimizer with less state"


def _as_it_ran(parts: Parts) -> str:
    model = parts.config.model.model_copy(update={"dtype": str(parts.dtype).removeprefix("torch.")})
    return parts.config.model_copy(update={"model": model}).to_yaml()


def _planned(request: Request, config: RunConfig) -> tuple[list[str], str]:
    """The answers of `ways_out`, one process of this machine after the other, and why there are no more."""
    from filelock import FileLock, Timeout

    limit = min(PLANNING_S, config.parallel.timeout_s / 3)
    lock = Path(tempfile.gettempdir()) / f"collie-{getpass.getuser()}-plan.lock"
    command = [sys.executable, "-m", "collie_core.plan.ways_out"]
    try:
        with FileLock(lock, timeout=limit):
            done = subprocess.run(
                command,
                input=as_json(request),
                capture_output=True,
                text=True,
                timeout=limit,
                env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
                check=False,
            )
    except (Timeout, subprocess.TimeoutExpired) as late:
        said = getattr(late, "stdout", None) or b""
        return _answers(said.decode()), f"planning took longer than {limit:g} s"
    except OSError as error:
        return [], str(error)
    why = done.stderr.strip().splitlines()[-1:] or [f"planning ended with exit code {done.returncode}"]
    return _answers(done.stdout), why[0] if done.returncode else ""


def _answers(printed: str) -> list[str]:
    """Whole lines of JSON; libraries may print others."""
    lines = [line for line in printed.splitlines() if line.startswith('"') and line.endswith('"')]
    return [json.loads(line) for line in lines]
