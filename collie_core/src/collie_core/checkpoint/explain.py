"""What a run would go on from, in words: what is restored, cut anew, changed and begun again. Needs no torch."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collie_core.checkpoint import files
from collie_core.checkpoint.choose import choose
from collie_core.checkpoint.files import STATES, TRAINER
from collie_core.report.rundir import CHECKPOINTS, CONFIG, METRICS
from collie_core.report.text import memory

if TYPE_CHECKING:
    from collie_core.config.run import RunConfig

# What decides which numbers follow, so that a run does not go on when it has changed.
KEPT = ("optimizer.type", "train.seed", "adapter.type")
# What says nothing of the numbers that follow.
SILENT = ("checkpoint", "train.output_dir", "train.overwrite_output_dir", "report_to", "parallel")


def explain(config: RunConfig, processes: int) -> str:
    """Some lines for people.

    Args:
        config: of the run that would go on.
        processes: of all machines.

    Raises:
        CheckpointError: it could not, because of the checkpoint.
    """
    folder, wanted = Path(config.train.output_dir) / CHECKPOINTS, config.checkpoint.resume_from_checkpoint
    if wanted is None:
        return "begins: checkpoint.resume_from_checkpoint is not set"
    source = choose(wanted, folder)
    if source is None:
        return f"begins: {folder} has no checkpoint"
    found = files.read_json(source / TRAINER)
    goes_on = source.resolve().parent == folder.resolve()
    lines = [
        ("goes on from", _origin(source)),
        ("restored", _restored(found, source)),
        ("cut anew", _cut_anew(found["topology"], config, processes)),
        *(("changed", line) for line in _changes(source, config)),
        ("begun again", _begun_again(folder.parent / METRICS, int(found["step"])) if goes_on else "metrics.jsonl"),
        ("not kept", "what callbacks and plugins remember; random states, which follow from seed and step"),
        ("still asked", "whether parameters and training data are the same; a run says so before it writes"),
    ]
    return "\n".join(f"{name:<14}{line}" for name, line in lines if line)


def _origin(source: Path) -> str:
    manifest = files.read_manifest(source)
    count = len(manifest.files)
    return f"{source}, of {manifest.created}, {memory(manifest.nbytes)} in {count} files, every one as it was written"


def _restored(found: Mapping[str, Any], source: Path) -> str:
    states = sorted({name.rpartition("/")[2] for name in _tensor_names(source / STATES)} - {"weight"})
    masters = found["weights"] == STATES
    parts = [
        f"step {found['step']} of {found['max_steps']}, epoch {found['epoch']:.3g}",
        f"{found['position']} samples read",
        f"{len(found['parameters'])} parameters{' in the precision of training' if masters else ''}",
        f"{found['optimizer']} with {', '.join(states) or 'no states'}",
        "schedule",
        *(["loss scale"] if found["loss_scale"] else []),
    ]
    best = found["followers"].get("best", {}).get("best", {})
    if best:
        parts.append(f"best {best['metric']} {best['value']:.6g} of step {best['step']}")
    return "; ".join(parts)


def _tensor_names(path: Path) -> list[str]:
    """Of a safetensors file, whose header is JSON behind its length."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return [name for name in json.loads(file.read(length)) if name != "__metadata__"]


def _cut_anew(before: Mapping[str, int], config: RunConfig, processes: int) -> str:
    parallel = config.parallel
    here = {
        "tensor_parallel_size": parallel.tensor_parallel_size,
        "pipeline_parallel_size": parallel.pipeline_parallel_size,
        "data_parallel_size": max(1, processes // parallel.copy_size),
        "zero_stage": parallel.zero_stage,
    }
    changed = [f"{name} {before[name]} -> {here[name]}" for name in here if before[name] != here[name]]
    if not changed:
        return "nothing: the same ranks, so the same numbers to the last bit"
    return f"{', '.join(changed)}: the same numbers to float32 rounding"


def _changes(source: Path, config: RunConfig) -> Iterator[str]:
    from collie_core.config.loading import read_file

    before = dict(_flat(read_file(source / CONFIG).data))
    here = dict(_flat(config.model_dump(mode="json")))
    for key in sorted(before.keys() | here.keys()):
        if before.get(key) != here.get(key) and not key.startswith(SILENT):
            refused = " (the run will refuse this)" if key in KEPT else ""
            yield f"{key}: {_short(before.get(key))} -> {_short(here.get(key))}{refused}"


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, Mapping) or not value:
        yield prefix, value
        return
    for key, below in value.items():
        yield from _flat(below, f"{prefix}.{key}" if prefix else str(key))


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:59]}…"


def _begun_again(metrics: Path, step: int) -> str:
    """Steps that are done a second time, as far as the record knows."""
    if not metrics.is_file():
        return ""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    last = max((int(row["step"]) for row in rows), default=step)
    return f"steps {step + 1} to {last}, and their rows of {metrics.name}" if last > step else ""
