"""Plans fork, which cannot be done beside a process group."""

from __future__ import annotations

import pytest
import torch.distributed as dist


@pytest.fixture(autouse=True)
def no_process_group() -> None:
    """What a test before these has left behind in this process."""
    if dist.is_initialized():
        dist.destroy_process_group()
