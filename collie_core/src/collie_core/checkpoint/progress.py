"""How far a run has come, as plain numbers: everything of a checkpoint that is no tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from collie_core.checkpoint.files import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from collie_core.data.dataset import TokenizedDataset


def data_identity(dataset: TokenizedDataset, seed: int) -> dict[str, Any]:
    """What decides which sample stands at which position."""
    found = hashlib.sha256(dataset.lengths.tobytes())
    for index in (0, len(dataset) // 2, len(dataset) - 1):
        found.update(dataset[index]["input_ids"].tobytes())
    ranges = [[source.start, source.stop, source.per_epoch] for source in dataset.ranges]
    return {"samples": len(dataset), "sources": ranges, "digest": found.hexdigest()[:32], "seed": seed}


def require_same_data(saved: Mapping[str, Any], here: Mapping[str, Any], source: Path) -> None:
    """A position says nothing about other data.

    Raises:
        CheckpointError: they are others, or in another order; names a difference.
    """
    if saved["seed"] != here["seed"]:
        raise CheckpointError(
            f"{source} is of a run with train.seed={saved['seed']}, which orders the samples; it is {here['seed']} here"
        )
    if saved["samples"] != here["samples"]:
        raise CheckpointError(
            f"{source} is of other training data: {saved['samples']} samples there, and {here['samples']} here"
        )
    if saved != here:
        raise CheckpointError(f"{source} is of other training data, as many but with other tokens or weights")


def schedule_state(scheduler: LRScheduler) -> dict[str, Any]:
    """What a checkpoint keeps of a schedule.

    Raises:
        CheckpointError: one that was handed in keeps what is no plain number.
    """
    if isinstance(scheduler, LambdaLR):  # a function of the step; groups may differ between topologies
        return {"type": "LambdaLR", "last_epoch": scheduler.last_epoch}
    state = {"type": type(scheduler).__name__, **scheduler.state_dict()}
    try:
        return dict(json.loads(json.dumps(state, allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the handed-in {state['type']} cannot be kept in a checkpoint: {error}") from error


def restore_schedule(scheduler: LRScheduler, state: Mapping[str, Any], source: Path) -> None:
    """Go on with what `schedule_state` gave.

    Raises:
        CheckpointError: this is another kind of schedule.
    """
    kind = "LambdaLR" if isinstance(scheduler, LambdaLR) else type(scheduler).__name__
    if kind != state["type"]:
        raise CheckpointError(f"{source} is of a run with a schedule {state['type']}, and it is {kind} here")
    if isinstance(scheduler, LambdaLR):
        done = scheduler.last_epoch = state["last_epoch"]
        scheduler._step_count = done + 1
        functions = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        scheduler._last_lr = [base * function(done) for base, function in functions]
    else:
        scheduler.load_state_dict({key: value for key, value in state.items() if key != "type"})
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
