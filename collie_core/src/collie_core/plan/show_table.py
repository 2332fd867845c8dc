"""A table of strategies as text, and as an object."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from collie_core.plan.hardware import COMPUTE_SHARE, LINK_SHARE, MEMORY_SHARE
from collie_core.plan.plan import as_object
from collie_core.plan.show import bytes_text
from collie_core.plan.table import Machines, Ranked, Table

COLUMNS = ("", "tp", "pp", "dp", "ZeRO", "offload", "checkpointing", "micro-batch", "peak", "tokens/s", "s/step")
OFFLOAD = COLUMNS.index("offload")
SHOWN = 20


def table_text(table: Table, machines: Machines) -> str:
    """The fastest strategies that fit, what their speed rests on, and how to use the first one."""
    nodes = f"{machines.nodes} node{'' if machines.nodes == 1 else 's'}"
    gpus = f"{machines.gpus} {machines.hardware.name} of {bytes_text(machines.memory)} in {nodes}"
    if not table.ranked:
        return f"none of {table.tried} strategies fits on {gpus}; take more, an adapter, or a smaller data.max_length"
    rows = [COLUMNS, *(_row(number, one) for number, one in enumerate(table.ranked[:SHOWN], 1))]
    if not any(row[OFFLOAD] for row in rows[1:]):
        rows = [(*row[:OFFLOAD], *row[OFFLOAD + 1 :]) for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    more = [f"and {len(table.ranked) - SHOWN} more"] if len(table.ranked) > SHOWN else []
    best = table.ranked[0].strategy.changes
    overrides = " ".join(f"{key}={value}" for key, value in best.items())
    first = [f"{len(table.ranked)} of {table.tried} strategies fit on {gpus}", ""]
    return "\n".join([*first, *lines, *more, "", *_speed_lines(machines), "", "to use the first:", f"  {overrides}"])


def table_object(table: Table, machines: Machines) -> dict[str, Any]:
    """What `--json` prints."""
    hardware = machines.hardware
    shares = {"compute_share": COMPUTE_SHARE, "link_share": LINK_SHARE, "memory_share": MEMORY_SHARE}
    return {
        "gpus": machines.gpus,
        "nodes": machines.nodes,
        "gpu_memory_bytes": machines.memory,
        "host_memory_bytes": machines.host_memory,
        "hardware": asdict(hardware) | shares,
        "strategies_tried": table.tried,
        "strategies": [
            {
                "overrides": [f"{key}={value}" for key, value in one.strategy.changes.items()],
                "predicted_peak_bytes": one.peak.total,
                "predicted_host_peak_bytes": one.host,
                "phase": one.peak.phase,
                "components": one.peak.components,
                "predicted_tokens_per_s": one.tokens_per_s,
                "predicted_step_s": one.step_s,
                "layers_traced": one.layers_traced or "all",
            }
            for one in table.ranked
        ],
        "plan_of_first": None if table.plan is None else as_object(table.plan, None),
    }


def _row(number: int, one: Ranked) -> tuple[str, ...]:
    strategy = one.strategy
    shape = strategy.shape
    about = "~" if one.layers_traced and (strategy.zero_stage in (1, 2) or strategy.offload) else ""
    chosen = [value for _, value in strategy.choices]
    return (
        " ".join([str(number), *chosen]),
        str(shape.tp),
        str(shape.pp),
        str(shape.dp),
        str(strategy.zero_stage),
        f"{'+'.join(strategy.offload)}: {about}{bytes_text(one.host)}" if strategy.offload else "",
        strategy.checkpointing,
        f"{strategy.micro_batch} x {strategy.accumulation}",
        about + bytes_text(one.peak.total),
        f"{one.tokens_per_s:,.0f}",
        f"{one.step_s:.2f}",
    )


def _speed_lines(machines: Machines) -> list[str]:
    hardware = machines.hardware
    flops, link, network, memory, host, host_memory = (
        f"{share:.0%} of {speed / unit:,.0f} {name}"
        for share, speed, unit, name in (
            (COMPUTE_SHARE, hardware.flops, 1e12, "TFLOP/s"),
            (LINK_SHARE, hardware.link, 1e9, "GB/s"),
            (LINK_SHARE, hardware.network, 1e9, "GB/s"),
            (MEMORY_SHARE, hardware.memory_speed, 1e9, "GB/s"),
            (LINK_SHARE, hardware.host_link, 1e9, "GB/s"),
            (MEMORY_SHARE, hardware.host_memory_speed, 1e9, "GB/s"),
        )
    )
    return [
        f"Speeds are those of a model, not measured: matrix products at {flops}, exchanges at {link} in a",
        f"node and at {network} between nodes, updates at {memory}, what is offloaded moved at {host}",
        f"and updated at {host_memory}, and nothing overlaps",
        f"({hardware.source}). Peaks with ~ are read from a few layers of the model.",
    ]
