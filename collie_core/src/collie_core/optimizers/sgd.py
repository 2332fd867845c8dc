"""SGD, without momentum with torch's fused kernel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from collie_core.optimizers.adamw import fused_kernel_fits


def sgd(params: Iterable[dict[str, Any]], **options: Any) -> torch.optim.SGD:
    """`torch.optim.SGD` over parameter groups, fused where torch has the kernel.

    With momentum torch's fused kernel fails when some parameters had no gradient yet and others had one (torch 2.13).
    """
    groups = list(params)
    return torch.optim.SGD(groups, fused=not options.get("momentum") and fused_kernel_fits(groups), **options)
