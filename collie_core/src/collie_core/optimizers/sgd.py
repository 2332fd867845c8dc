"""SGD with torch's fused kernel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from collie_core.optimizers.adamw import fused_kernel_fits


def sgd(params: Iterable[dict[str, Any]], **options: Any) -> torch.optim.SGD:
    """`torch.optim.SGD` over parameter groups, fused where torch has the kernel."""
    groups = list(params)
    return torch.optim.SGD(groups, fused=fused_kernel_fits(groups), **options)
