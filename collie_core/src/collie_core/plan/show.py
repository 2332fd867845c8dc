"""A plan as text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from collie_core.errors import RunError
from collie_core.plan.trace import COMPONENTS

if TYPE_CHECKING:
    from collie_core.plan.plan import Kind, Plan
    from collie_core.plan.remedy import Remedy
    from collie_core.plan.room import Room

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def parse_bytes(text: str) -> int:
    """`80GiB`, `24 GB` or `512MiB` in bytes.

    Raises:
        RunError: it says something else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    unit = next((unit for unit in UNITS if found and unit.lower() == found[2].lower()), None)
    if found is None or unit is None or float(found[1]) == 0:
        raise RunError(f"{text!r} is no amount of memory: write it as 80GiB or 24GB")
    return int(float(found[1]) * UNITS[unit])


def bytes_text(nbytes: float) -> str:
    """In the largest unit that leaves at least 1."""
    unit = next((unit for unit in ("TiB", "GiB", "MiB", "KiB") if abs(nbytes) >= UNITS[unit]), "B")
    return f"{nbytes / UNITS[unit]:.2f} {unit}" if unit != "B" else f"{int(nbytes)} B"


def plan_text(plan: Plan, measured: Sequence[int] | None = None) -> str:
    """A table of what each kind of rank holds at its peak."""
    shape = plan.shape
    axes = {"tensor-parallel": shape.tp, "pipeline stages": shape.pp, "data-parallel": shape.dp}
    processes = f"{shape.processes} process{'es' if shape.processes > 1 else ''}"
    layout = ", ".join(f"{size} {name}" for name, size in axes.items() if size > 1)
    lines = [f"{processes}{f' ({layout})' if layout else ''}, {plan.dtype}; {plan.batch}", ""]
    columns = [_column(kind, measured) for kind in plan.kinds]
    names = ["", "peak in", *COMPONENTS, "predicted"] + ([] if measured is None else ["measured", "difference"])
    names += ["in host memory"] if plan.offloads else []
    rows = [(name, [column[name] for column in columns]) for name in names]
    kept = [(name, cells) for name, cells in rows if any(cell != "0 B" for cell in cells)]
    width = max(len(cell) for _, cells in kept for cell in cells)
    lines += [f"{name:<16}" + "".join(f"  {cell:>{width}}" for cell in cells) for name, cells in kept]
    total = f"in all: {bytes_text(sum(plan.predicted.values()))} predicted"
    total += f" and {bytes_text(sum(plan.host.values()))} in host memory" if plan.offloads else ""
    total += "" if measured is None else f", {bytes_text(sum(measured))} measured"
    if (depths := plan.kinds[0].prediction.layers) is not None:
        total += f"; read from {depths[0]} and {depths[1]} layers of each stage, which are all alike"
    return "\n".join([*lines, "", total])


def _column(kind: Kind, measured: Sequence[int] | None) -> dict[str, str]:
    peak = kind.prediction.peak
    found = {"": _ranks(kind.ranks), "peak in": peak.phase, "predicted": bytes_text(peak.total)}
    found |= {name: bytes_text(nbytes) for name, nbytes in peak.components.items()}
    found["in host memory"] = bytes_text(kind.prediction.host_peak.total)
    if measured is not None:
        most = max(measured[rank] for rank in kind.ranks)
        found |= {"measured": bytes_text(most), "difference": f"{100 * (peak.total / most - 1):+.2f} %"}
    return found


def _ranks(ranks: Sequence[int]) -> str:
    """`rank 0`, `ranks 0-3`, or `ranks 0, 2`."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) == ranks[-1] - ranks[0] + 1:
        return f"ranks {ranks[0]}-{ranks[-1]}"
    return "ranks " + ", ".join(map(str, ranks[:3])) + (", ..." if len(ranks) > 3 else "")


def verdict(plan: Plan, room: Room) -> str:
    """Whether the largest rank fits into a device, and what the ranks of a machine offload into its memory."""
    where, short = _ranks(plan.largest.ranks), room.short(plan)
    if short:
        largest = max(plan.largest.prediction.peak.components.items(), key=lambda item: item[1])
        return (
            f"does NOT fit: {where} would need {bytes_text(short)} more than {bytes_text(room.nbytes)}, most of it for "
            f"{largest[0]}: {bytes_text(largest[1])}"
        )
    if room.host is not None and (short := room.host_short(plan)):
        return (
            f"does NOT fit: a machine's ranks would need {bytes_text(short)} more than {bytes_text(room.host.nbytes)}"
        )
    free = room.nbytes - plan.largest.predicted
    return f"fits: {where} would leave {bytes_text(free)} of {bytes_text(room.nbytes)} free"


def remedy_text(remedy: Remedy | None, processes: int) -> str:
    """What would make it fit, as arguments of the command line."""
    if remedy is None:
        return (
            f"it would not fit on {processes} process{'es' if processes > 1 else ''} with gradient checkpointing, the "
            "smallest micro-batch, all ranks sharing the model, and what can be offloaded from a GPU either: plan for "
            "more, shorten data.max_length, or choose an adapter or an optimizer with less state"
        )
    most = bytes_text(remedy.plan.largest.predicted)
    return f"would fit, with {most} at the most:\n  {' '.join(remedy.overrides)}"
