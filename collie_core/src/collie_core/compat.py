"""Where a dependency must be bent: each bend a context manager that raises when its target has changed."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

_SHM_BUILDERS = ("deepspeed_shm_comm", "shm_comm")


@contextmanager
def deepspeed_start(local_rank: int) -> Iterator[None]:
    """Start DeepSpeed (0.19) quietly, without a launcher's environment and without compiling anything on CPU.

    On CPU it would build its shared-memory collectives first: half a minute, and killing a process during the build
    leaves a lock file on which every later start of this user waits for ever. It also reads LOCAL_RANK whenever it
    likes, so that variable stays set: the one trace that a DeepSpeed run leaves in the environment of its process.

    Raises:
        RuntimeError: DeepSpeed no longer asks `deepspeed.ops.__compatible_ops__`.
    """
    import deepspeed

    backend = import_module("deepspeed.comm.torch")  # the package's own attribute of that name is torch itself
    if "__compatible_ops__" not in backend.build_shm_op.__code__.co_names:
        raise RuntimeError("DeepSpeed changed build_shm_op; collie_core.compat needs an update")
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    # The table is probed on first access by running compilers; a short one stands in for it meanwhile.
    known = vars(deepspeed.ops).get("__compatible_ops__")
    deepspeed.ops.__compatible_ops__ = (known or {}) | dict.fromkeys(_SHM_BUILDERS, False)
    os.environ.setdefault("LOCAL_RANK", str(local_rank))
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
        if known is None:
            del deepspeed.ops.__compatible_ops__
        else:
            deepspeed.ops.__compatible_ops__ = known
