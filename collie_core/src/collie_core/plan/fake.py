"""A rank of a run in this process alone, without the others and without memory for its tensors.

Tensors are fake: they have a shape, a type and a storage of some size, and no values. The other ranks are a process
group that answers every collective at once. Both are torch's own, for its tests and its compiler.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
    unset_fake_temporarily,
)

from collie_core.compat import (
    deepspeed_without_values,
    fake_tensors_move,
    forget_deepspeed_groups,
    modules_convert_fake_tensors,
    transformers_without_values,
)
from collie_core.plan.trace import HOST, MemoryTrace


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
        stack.enter_context(patch("torch.cuda.is_available", lambda: False))  # which a fork could not use
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        stack.callback(dist.destroy_process_group)
        forget_deepspeed_groups()  # of the process that forked this one
        stack.enter_context(transformers_without_values(packing=packing))
        if zero:
            stack.enter_context(deepspeed_without_values(trace.device, trace.pinned))
        stack.enter_context(modules_convert_fake_tensors())
        stack.enter_context(fake_tensors_move())
        stack.enter_context(patch("torch.compile", _compiled_without(trace)))
        stack.enter_context(QuickFakeTensors(trace))
        yield


def _compiled_without(trace: MemoryTrace) -> Callable[..., Any]:
    """A stand-in for `torch.compile`: what is compiled has no intermediate results."""

    def compile(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with trace.paused():
                return function(*args, **kwargs)

        return run

    return compile


class QuickFakeTensors(FakeTensorMode):
    """Fake tensors that take a fifth of the time: what an operation has given for such arguments is remembered.

    FakeTensorMode remembers it too, but its keys cover all that can be traced and cost more than most operations. A
    trace on top of it, as a mode of its own, would cost as much once more.

    What a step asks its numbers is answered as where all is well: they are finite, and every token is a target. Counts
    of steps, which are made from constants of the host alone, have their true value.

    Args:
        trace: is told of every operation.
    """

    _given: ClassVar[dict[Any, list[_Recipe] | _Recipe | None]] = {}  # for this process, and those forked from it

    def __init__(self, trace: MemoryTrace | None = None) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._trace = trace
        self._inside = False  # an operation: those it consists of are not traced
        self._blank: dict[torch.device, dict[str, Any]] = {}  # attributes of fake tensors there

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the wrapper that says so takes as long as an operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE and isinstance(args[0], FakeTensor) and not self.in_kernel_invocation:
            return args[0].fake_device  # asked for more often than all operations together
        kwargs = kwargs or {}
        if self._inside or func.namespace == "prim":
            return self.dispatch(func, types, args, kwargs)
        self._inside = True
        try:
            result = self._answered(func, types, args, kwargs)
        finally:
            self._inside = False
        if self._trace is not None:
            self._trace.note(func, args, kwargs, result)
        return result

    def _answered(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """The result of an operation, with an answer where a step asks."""
        if func is _ATEN.nonzero.default:
            return args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.int64)
        if func is _ATEN._local_scalar_dense.default and getattr(args[0], "constant", None) is None:
            return _answer(args[0])
        result = self.dispatch(func, types, args, kwargs)
        if func in _CONSTANTS and isinstance(result, FakeTensor) and result.numel() == 1 and result.device == HOST:
            with unset_fake_temporarily():
                result.constant = func(*args, **kwargs)
            self.fake_tensor_converter.add_constant_storage_mapping(result)
        if func in _NO:
            result.collie_no = True
        return result

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As that of FakeTensorMode."""
        view = _VIEWS.get(func)
        if view is not None and not kwargs and isinstance(args[0], FakeTensor) and _may_be_described(args[0]):
            return self._view(args[0], *view(*args))
        if func.namespace == "c10d":  # all of them give back what they were given
            with in_kernel_invocation_manager(self):
                return func(*args, **kwargs)
        key = _key(func, args, kwargs)
        if key is None:
            return super().dispatch(func, types, args, kwargs)
        if key not in self._given:
            result = super().dispatch(func, types, args, kwargs)
            self._given[key] = _recipes(result, args)
            return result
        found = self._given[key]
        if found is None:
            return super().dispatch(func, types, args, kwargs)
        if isinstance(found, _Recipe):
            return self._made(found, args)
        return tuple(self._made(recipe, args) for recipe in found)

    def _made(self, recipe: _Recipe, args: Any) -> Any:
        if recipe.argument is not None:
            shares = args[recipe.argument]
            if recipe.shape is None:
                return shares
            offset = shares.storage_offset() + recipe.offset
            return self._view(shares, recipe.shape, recipe.stride, offset, recipe.dtype)
        with torch._C._DisableTorchDispatch():
            meta = torch.empty_strided(recipe.shape, recipe.stride, dtype=recipe.dtype, device="meta")
        return self._fake(meta, recipe.device)

    def _view(self, base: FakeTensor, shape: Any, stride: Any, offset: int, dtype: Any = None) -> Any:
        with torch._C._DisableTorchDispatch():
            meta = torch.empty(0, dtype=dtype or base.dtype, device="meta")
            meta.set_(base.untyped_storage(), offset, shape, stride)
        return self._fake(meta, base.fake_device)

    def _fake(self, meta: torch.Tensor, device: torch.device) -> Any:
        """`FakeTensor(self, meta, device)`, without looking at all that it could be."""
        if device not in self._blank:
            self._blank[device] = dict(vars(FakeTensor(self, meta, device)))
        made = torch.Tensor._make_subclass(
            FakeTensor, meta, False, dispatch_device=True, device_for_backend_keys=device
        )
        made.__dict__.update(self._blank[device])
        return made


@dataclass(frozen=True, slots=True)
class _Recipe:
    """How to make a result: it is an argument (without a shape), a view of one, or new."""

    argument: int | None = None
    shape: Any = None
    stride: Any = None
    dtype: Any = None
    offset: int = 0  # of a view: from where its argument begins
    device: Any = None


GPU = torch.device("cpu", 0)
"""Of fake tensors on a GPU. It differs from the CPU, and asks nothing of torch that a build without CUDA lacks."""

_CHANGING = {torch.Tag.inplace_view, torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


@cache
def _may_be_remembered(func: Any) -> bool:
    return func.namespace == "aten" and _CHANGING.isdisjoint(func.tags) and func not in (_ATEN.set_.source_Storage,)


def _key(func: Any, args: Any, kwargs: Any) -> Any:
    """Equal where an operation gives results of the same kind; None: it may not be remembered."""
    if not _may_be_remembered(func):
        return None
    found: list[Any] = [func, torch.get_default_dtype()]
    for argument in args:
        if not _describe(argument, found):
            return None
    for name, argument in kwargs.items():
        found.append(name)
        if isinstance(argument, torch.Tensor) or not _describe(argument, found):  # it may be what is given back
            return None
    return tuple(found)


def _may_be_described(tensor: FakeTensor) -> bool:
    return tensor.constant is None and tensor.fake_device.type == "cpu"


def _describe(argument: Any, found: list[Any]) -> bool:
    if isinstance(argument, FakeTensor):
        found += (argument.shape, argument.stride(), argument.dtype, argument.fake_device)
        return _may_be_described(argument)
    if isinstance(argument, torch.Tensor):
        return False
    if isinstance(argument, list | tuple):
        found.append(len(argument))
        return all(_describe(one, found) for one in argument)
    found += (type(argument), argument)
    return True


def _recipes(result: Any, args: Any) -> list[_Recipe] | _Recipe | None:
    if isinstance(result, tuple):
        found = [recipe for one in result if (recipe := _recipe(one, args)) is not None]
        return found if len(found) == len(result) else None
    return _recipe(result, args)


def _recipe(result: Any, args: Any) -> _Recipe | None:
    """None: it is of another kind."""
    if not isinstance(result, FakeTensor) or result.constant is not None or result.fake_device.type != "cpu":
        return None
    if result.layout != torch.strided or result.is_conj() or result.is_neg():
        return None
    kind: tuple[Any, Any, Any] = tuple(result.shape), result.stride(), result.dtype
    storage = result.untyped_storage()
    for number, argument in enumerate(args):
        if argument is result:
            return _Recipe(number)
        if isinstance(argument, FakeTensor) and argument.untyped_storage()._cdata == storage._cdata:
            return _Recipe(number, *kind, int(result.storage_offset() - argument.storage_offset()))
    with torch._C._DisableTorchDispatch():
        fresh = torch.empty_strided(result.shape, result.stride(), dtype=result.dtype, device="meta")
    known = fresh.untyped_storage().nbytes() == storage.nbytes() and result.storage_offset() == 0
    return _Recipe(None, *kind, device=result.fake_device) if known else None


def _sliced(tensor: torch.Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    """Shape, stride and offset of a slice; flat buffers are cut at thousands of places, each at another one."""
    shape, stride = list(tensor.shape), list(tensor.stride())
    begin, stop, _ = slice(start, end, step).indices(shape[dim])
    offset = tensor.storage_offset() + begin * stride[dim]
    shape[dim], stride[dim] = len(range(begin, stop, step)), stride[dim] * step
    return shape, stride, offset


def _strided(tensor: torch.Tensor, shape: Any, stride: Any, offset: int | None = None) -> Any:
    return shape, stride, tensor.storage_offset() if offset is None else offset


_VIEWS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.slice.Tensor: _sliced,
    torch.ops.aten.as_strided.default: _strided,
}


_DEVICE = torch.ops.prim.device.default
_ATEN = torch.ops.aten
_CONSTANTS = (_ATEN.zeros.default, _ATEN.ones.default, _ATEN.full.default)
_NO = (_ATEN.any.default, _ATEN.logical_not.default)  # with which one asks whether anything is wrong


def _answer(tensor: torch.Tensor) -> bool | float | int:
    if tensor.dtype == torch.bool:
        return not hasattr(tensor, "collie_no")
    return 0.0 if tensor.is_floating_point() else 0
