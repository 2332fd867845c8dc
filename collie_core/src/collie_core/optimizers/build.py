"""What every optimizer is given: parameter groups, and a schedule over its learning rate."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from collie_core.errors import RunError

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from collie_core.config.optimizer import LRSchedulerConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters: matrices and embeddings with weight decay, vectors (norms, biases) without.

    Raises:
        RunError: nothing is trainable.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise RunError("the model has no trainable parameter")
    decayed = [parameter for parameter in trainable if _dimensions(parameter) >= 2]
    plain = [parameter for parameter in trainable if _dimensions(parameter) < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _dimensions(parameter: nn.Parameter) -> int:
    """Also of a parameter that ZeRO-3 has taken apart, which leaves an empty vector behind."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def schedule(section: LRSchedulerConfig, optimizer: Optimizer, max_steps: int) -> LRScheduler:
    """The schedule of the transformers library over `max_steps` optimizer steps, warm-up first."""
    from transformers import get_scheduler

    warmup = section.warmup_steps if section.warmup_steps else math.ceil(section.warmup_ratio * max_steps)
    name = "constant_with_warmup" if section.type == "constant" and warmup else section.type
    return cast("LRScheduler", get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=max_steps))
