"""What GPUs can do, by their data sheets: the constants of the model of speed. Nothing here was measured."""

from __future__ import annotations

from dataclasses import dataclass

from collie_core.errors import RunError


@dataclass(frozen=True)
class Hardware:
    """Per GPU."""

    name: str
    flops: float  # per second of dense matrix products in 16 bits
    flops_float32: float
    memory: int  # bytes
    memory_speed: float  # bytes per second
    link: float  # bytes per second in one direction to the other GPUs of its node
    network: float  # bytes per second in one direction to other nodes
    host_link: float  # bytes per second in one direction to host memory
    host_memory_speed: float  # bytes per second; its share of the memory of its node
    source: str


GB = 1e9
HARDWARE = {
    each.name: each
    for each in (
        Hardware(
            "h100",
            989e12,
            67e12,
            80 * 2**30,
            3350 * GB,
            450 * GB,
            50 * GB,
            64 * GB,
            76.8 * GB,
            "NVIDIA H100 SXM5 data sheet; DGX H100",
        ),
        Hardware(
            "h200",
            989e12,
            67e12,
            141 * 10**9,
            4800 * GB,
            450 * GB,
            50 * GB,
            64 * GB,
            76.8 * GB,
            "NVIDIA H200 SXM data sheet; DGX H200",
        ),
        Hardware(
            "a100",
            312e12,
            19.5e12,
            80 * 2**30,
            2039 * GB,
            300 * GB,
            25 * GB,
            32 * GB,
            51.2 * GB,
            "NVIDIA A100 SXM data sheet; DGX A100",
        ),
        Hardware(
            "l40s",
            362e12,
            91.6e12,
            48 * 2**30,
            864 * GB,
            32 * GB,
            25 * GB,
            32 * GB,
            76.8 * GB,
            "NVIDIA L40S data sheet; PCIe 4.0 x16",
        ),
    )
}
COMPUTE_SHARE = 0.5  # of the data sheet's FLOP/s that matrix products of training reach
LINK_SHARE = 0.7  # of the data sheet's bandwidths that collectives reach
MEMORY_SHARE = 0.8


def hardware_named(name: str) -> Hardware:
    """One of `HARDWARE`.

    Raises:
        RunError: it is none.
    """
    if name not in HARDWARE:
        raise RunError(f"--hardware {name}: not known; choose one of {', '.join(HARDWARE)}")
    return HARDWARE[name]
