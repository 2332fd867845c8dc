"""The arithmetic of the global batch: any two of three sizes decide the third."""

from __future__ import annotations

from dataclasses import dataclass

from collie_core.config.train import TrainConfig
from collie_core.errors import Problem


@dataclass(frozen=True)
class BatchSizes:
    """Samples of one optimizer step: `per_device x accumulation x data_parallel`."""

    per_device: int
    accumulation: int
    data_parallel: int

    @property
    def total(self) -> int:
        """Samples per optimizer step over all ranks."""
        return self.per_device * self.accumulation * self.data_parallel

    def __str__(self) -> str:
        return (
            f"{self.total} samples per step = {self.per_device} per device x {self.accumulation} accumulated"
            f" x {self.data_parallel} data-parallel"
        )


def batch_sizes(train: TrainConfig, data_parallel_size: int) -> BatchSizes | Problem:
    """The three sizes for so many data-parallel ranks, or why they do not come out whole."""
    micro, steps, total = (
        train.per_device_train_batch_size,
        train.gradient_accumulation_steps,
        train.global_batch_size,
    )
    if total is None:
        return BatchSizes(micro or 1, steps or 1, data_parallel_size)
    if micro is None and steps is not None:
        sizes = BatchSizes(total // (steps * data_parallel_size), steps, data_parallel_size)
    else:
        micro = micro or 1
        sizes = BatchSizes(micro, steps or total // (micro * data_parallel_size), data_parallel_size)
    return sizes if sizes.total == total else _not_whole(train, data_parallel_size)


def impossible_batch(train: TrainConfig) -> Problem | None:
    """A problem when no number of data-parallel ranks at all makes the sizes whole."""
    known = (train.per_device_train_batch_size or 1) * (train.gradient_accumulation_steps or 1)
    total = train.global_batch_size
    return _not_whole(train, None) if total is not None and total % known else None


def _not_whole(train: TrainConfig, data_parallel_size: int | None) -> Problem:
    factors = {
        "per_device_train_batch_size": train.per_device_train_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "data_parallel_size": data_parallel_size,
    }
    written = {name: value for name, value in factors.items() if value is not None}
    total, unit = train.global_batch_size or 0, 1
    for value in written.values():
        unit *= value
    decided = None not in factors.values()
    names, values = " x ".join(written), " x ".join(map(str, written.values()))
    product = f"{names} = {values}" + (f" = {unit}" if len(written) > 1 else "")
    relation = "must be" if decided else "must be a multiple of"
    below = total // unit * unit
    choices = [unit] if decided else [size for size in (below, below + unit) if size]
    hint = f"Set train.global_batch_size to {' or '.join(map(str, choices))}"
    hint += ", or leave one of the three out." if decided else "."
    return Problem("train.global_batch_size", f"{relation} {product}", total, hint)
