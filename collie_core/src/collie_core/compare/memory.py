"""The most that a rank of a run holds: predicted from fake tensors, and held in two real steps on full rows.

Both count from when the model stands, and neither knows how long samples really are: so they belong together, and hold
for every seed and learning rate. Each of these functions is called in a process of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from collie_core.config.run import RunConfig


def predict(path: str, overrides: Sequence[str], asked: int | None) -> int:
    """Bytes of the largest rank.

    Raises:
        CollieError: the run cannot be planned.
    """
    from collie_core.plan.plan import make_plan

    config, processes, gpu = _here(path, overrides, asked)
    return make_plan(config, processes, gpu=gpu).largest.predicted


def measure(path: str, overrides: Sequence[str], asked: int | None) -> int:
    """Bytes of the largest rank, in as many processes as the run has."""
    from collie_core.plan.measure import measure_rank, measure_ranks

    config, processes, _ = _here(path, overrides, asked)
    return measure_rank(config) if processes == 1 else max(measure_ranks(path, overrides, processes))


def _here(path: str, overrides: Sequence[str], asked: int | None) -> tuple[RunConfig, int, bool]:
    """The run with the precision that it has on this machine, its processes, and whether they have GPUs."""
    import torch

    from collie_core import launch
    from collie_core.plan.before_run import with_precision

    config, gpu = RunConfig.from_yaml(path, overrides, notes=[]), torch.cuda.is_available()
    return with_precision(config, gpu=gpu), launch.processes_to_start(asked, config.parallel), gpu
