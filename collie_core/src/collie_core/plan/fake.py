"""A rank of a run in this process alone, without the others and without memory for its tensors.

Tensors are fake: they have a shape, a type and a storage of some size, and no values. The other ranks are a process
group that answers every collective at once. Both are torch's own, for its tests and its compiler.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from collie_core.compat import (
    deepspeed_without_values,
    modules_convert_fake_tensors,
    transformers_without_values,
)
from collie_core.plan.trace import MemoryTrace


@contextmanager
def fake_rank(rank: int, world_size: int, trace: MemoryTrace, *, packing: bool, zero: bool) -> Iterator[None]:
    """Inside, tensors are fake and traced, and this process is one of many. For a process that ends with it.

    Args:
        rank, world_size: which one of how many.
        trace: is told of every tensor.
        packing: whether rows hold several samples.
        zero: whether DeepSpeed is used.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    own = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size), "DS_ACCELERATOR": "cpu"}
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        # DeepSpeed asks where its tensors lie, to see that they are aligned.
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        stack.enter_context(patch.dict(os.environ, own))
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        stack.callback(dist.destroy_process_group)
        stack.enter_context(transformers_without_values(packing=packing))
        if zero:
            stack.enter_context(deepspeed_without_values())
        stack.enter_context(modules_convert_fake_tensors())
        stack.enter_context(patch("torch.compile", _compiled_without(trace)))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(Answers())  # type: ignore[no-untyped-call]
        stack.enter_context(trace)
        yield


def _compiled_without(trace: MemoryTrace) -> Callable[..., Any]:
    """A stand-in for `torch.compile`: what is compiled has no intermediate results."""

    def compile(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with trace.paused():
                return function(*args, **kwargs)

        return run

    return compile


class Answers(TorchDispatchMode):
    """What a step asks its numbers, answered as where all is well: numbers are finite, and every token is a target.

    Counts of steps, which are made from constants alone, have their true value.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "prim":  # asks for attributes, often
            return func(*args, **(kwargs or {}))
        if func is _ATEN.nonzero.default:
            return args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.int64)
        if func is _ATEN._local_scalar_dense.default and getattr(args[0], "constant", None) is None:
            return _answer(args[0])
        result = func(*args, **(kwargs or {}))
        if func in _CONSTANTS and isinstance(result, FakeTensor) and result.numel() == 1:
            with unset_fake_temporarily():
                result.constant = func(*args, **(kwargs or {}))
            result.fake_mode.fake_tensor_converter.add_constant_storage_mapping(result)
        if func in _NO:
            result.collie_no = True
        return result


_ATEN = torch.ops.aten
_CONSTANTS = (_ATEN.zeros.default, _ATEN.ones.default, _ATEN.full.default)
_NO = (_ATEN.any.default, _ATEN.logical_not.default)  # with which one asks whether anything is wrong


def _answer(tensor: torch.Tensor) -> bool | float | int:
    if tensor.dtype == torch.bool:
        return not hasattr(tensor, "collie_no")
    return 0.0 if tensor.is_floating_point() else 0
