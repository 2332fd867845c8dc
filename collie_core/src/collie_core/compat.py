"""Where a dependency must be bent: each bend a context manager that raises when its target has changed."""

from __future__ import annotations

import copy
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

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
    logger.setLevel(logging.ERROR)  # it warns of every optimizer that is not its own
    try:
        yield
    finally:
        logger.setLevel(level)
        if known is None:
            del deepspeed.ops.__compatible_ops__
        else:
            deepspeed.ops.__compatible_ops__ = known


def forget_deepspeed_groups() -> None:
    """Let DeepSpeed (0.19.8) make its process groups anew, where those that it keeps went with an earlier one of torch.

    It forgets them only when it destroys the groups itself.
    """
    if "deepspeed" in sys.modules:
        import_module("deepspeed.utils.groups")._release_process_group_references()


def forget_gather_order(engine: Any) -> None:
    """Let ZeRO-3 of DeepSpeed (0.19) learn anew when it needs which weights: what it has seen was no training step.

    It learns that from its first forward and what follows until the next. Without a backward among it, weights are let
    go after the forward; and that answer stays in a cache when it sees a backward and learns anew. From then on every
    step gathers its weights twice, the second time one by one.

    Raises:
        RuntimeError: DeepSpeed no longer has `param_coordinator` where it was.
    """
    offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    if "param_coordinator" not in vars(offload):
        raise RuntimeError("DeepSpeed changed DeepSpeedZeRoOffload; collie_core.compat needs an update")
    offload.param_coordinator = copy.copy(offload.param_coordinator)  # which is part of the keys of the cache
    if not offload.param_coordinator.is_invalid_trace():
        offload.param_coordinator._invalidate_trace()


@contextmanager
def transformers_without_values(*, packing: bool) -> Iterator[None]:
    """Make the attention masks of transformers (5) on fake tensors that it makes on real ones.

    It takes fake tensors for those of a compiler and then builds a mask [B, 1, L, L] where a real run has none.

    Args:
        packing: whether rows hold several samples, which position ids without values do not say.

    Raises:
        RuntimeError: transformers no longer asks `masking_utils.is_tracing`.
    """
    masks: Any = import_module("transformers.masking_utils")
    find, traces = masks.find_packed_sequence_indices, masks.is_tracing
    if "is_tracing" not in find.__code__.co_names:
        raise RuntimeError("transformers changed find_packed_sequence_indices; collie_core.compat needs an update")
    masks.is_tracing = lambda tensor=None: False
    masks.find_packed_sequence_indices = lambda position_ids: position_ids if packing else None
    try:
        yield
    finally:
        masks.find_packed_sequence_indices, masks.is_tracing = find, traces


@contextmanager
def deepspeed_without_values(device: torch.device, pinned: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let DeepSpeed (0.19) trust that other ranks hold the same numbers, and that the device has float16.

    Fake tensors have no numbers, and stand for those of any device.

    Args:
        device: what DeepSpeed is to take for the device of this process.
        pinned: gives a copy in page-locked memory.

    Raises:
        RuntimeError: DeepSpeed no longer has `assert_ints_same_as_other_ranks` where it compares.
    """
    from deepspeed.accelerator import get_accelerator

    accelerator = type(get_accelerator())
    answers: dict[str, Any] = {
        "is_fp16_supported": lambda self: True,
        "device_name": lambda self, index=None: str(device),
        "current_device_name": lambda self: str(device),
        "device_count": lambda self: 1,  # on a CPU each question starts a process that looks for NUMA nodes
        "on_accelerator": lambda self, tensor: tensor.device == device,
        "pin_memory": lambda self, tensor, **how: pinned(tensor),
    }
    name = "assert_ints_same_as_other_ranks"
    places = [
        import_module(f"deepspeed.runtime.zero.{module}")
        for module in ("stage3", "partition_parameters", "partitioned_param_coordinator")
    ]
    if not all(hasattr(place, name) for place in places):
        raise RuntimeError(f"DeepSpeed no longer has {name}; collie_core.compat needs an update")
    with ExitStack() as stack:
        stack.enter_context(patch.multiple(accelerator, **answers))
        for place in places:
            stack.enter_context(patch.object(place, name, lambda ints: None))
        yield


@contextmanager
def modules_convert_fake_tensors() -> Iterator[None]:
    """Let `Module.to` change fake parameters (torch 2.13) in place as it does real ones.

    It would swap a fake parameter for another, which fails as soon as anything holds on to it.

    Raises:
        RuntimeError: torch no longer treats fake tensors in a way of their own there.
    """
    import torch
    from torch import nn

    apply = nn.Module._apply
    if "FakeTensor" not in apply.__code__.co_cellvars:
        raise RuntimeError("torch changed Module._apply; collie_core.compat needs an update")

    def convert(self: nn.Module, function: Callable[[Any], Any], recurse: bool = True) -> nn.Module:
        for module in self.modules() if recurse else [self]:
            for parameter in module._parameters.values():
                if parameter is not None:
                    with torch.no_grad():
                        parameter.data = function(parameter)
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else function(buffer)
        return self

    nn.Module._apply = convert  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = apply  # type: ignore[method-assign]


@contextmanager
def fake_tensors_move() -> Iterator[None]:
    """Let a fake tensor (torch 2.13) that is given other `data` lie where these do, as a real one does.

    Raises:
        RuntimeError: torch no longer keeps the device of a fake tensor beside it, or sees to its `data` itself.
    """
    from torch import Tensor
    from torch._subclasses.fake_tensor import FakeTensor

    if "data" in vars(FakeTensor) or "fake_device" not in FakeTensor.__new__.__code__.co_names:
        raise RuntimeError("torch changed FakeTensor; collie_core.compat needs an update")
    data: Any = Tensor.data

    def move(self: Any, values: Tensor) -> None:
        data.__set__(self, values)
        self.fake_device = values.device

    FakeTensor.data = property(data.__get__, move)  # type: ignore[assignment]
    try:
        yield
    finally:
        del FakeTensor.data


_EXCHANGE = re.compile(r"_?(all|reduce|broadcast|gather|scatter|barrier)\w*|send|recv|_(start|end)_coalescing")


@contextmanager
def collectives_watched(call: Callable[..., Any], wait: Callable[..., Any]) -> Iterator[None]:
    """Let every collective of this process, a library's too, go through two functions of ours (torch 2.13).

    Args:
        call: (name, torch's function, process group, its arguments) -> what torch's function returned.
        wait: (torch's function, the pending work, its arguments) -> the same.

    Raises:
        RuntimeError: torch's process groups no longer have one of these methods.
    """
    import torch.distributed as dist

    group: Any = dist.ProcessGroup
    work: Any = dist.Work
    # As they lie in the class: what an attribute of it gives is no method any more.
    kept = {name: method for name, method in vars(group).items() if _EXCHANGE.fullmatch(name)}
    kept_wait, wait_itself = vars(work).get("wait"), work.wait
    if kept_wait is None or not kept.keys() >= {"allreduce", "allgather", "broadcast", "barrier", "send", "recv"}:
        raise RuntimeError("torch changed its process groups; collie_core.compat needs an update")

    def through(name: str, function: Any) -> Any:
        return lambda self, *args, **kwargs: call(name, function, self, *args, **kwargs)

    for name in kept:
        setattr(group, name, through(name, getattr(group, name)))
    work.wait = lambda self, *args, **kwargs: wait(wait_itself, self, *args, **kwargs)
    try:
        yield
    finally:
        work.wait = kept_wait
        for name, function in kept.items():
            setattr(group, name, function)
