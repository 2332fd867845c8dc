"""What a training step does, counted while it is traced: multiplications, operations, and bytes that ranks exchange."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

Ranks = tuple[int, ...]
"""A group, by the numbers of its ranks in the run."""


@dataclass
class Work:
    """What one rank does."""

    flops: int = 0
    sent: Counter[Ranks] = field(default_factory=Counter)  # bytes that pass this rank's link, for each group
    moved: int = 0  # bytes between the device and host memory

    def note(self, func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> None:
        """An operation that was just done."""
        if func.namespace == "c10d":
            self._note_exchange(func, args)
        elif func in _COPIES:
            self._note_copy(args[0], result if func is _TO else args[1])
        elif (count := _FLOPS.get(func)) is not None:
            self.flops += count(*args, **kwargs)
        elif (formula := flop_registry.get(func.overloadpacket)) is not None:
            self.flops += int(formula(*args, **kwargs, out_val=result))

    def _note_exchange(self, func: Any, args: Any) -> None:
        passes = _PASSES.get(func._schema.name.removeprefix("c10d::"))
        if passes is None:
            return
        group = _group(args)
        tensors = [value for value in tree_iter(args[:2]) if isinstance(value, Tensor)]
        most = max(tensor.numel() * tensor.element_size() for tensor in tensors)
        ranks, share = tuple(dist.get_process_group_ranks(group)), passes(group.size())
        if func._schema.name in ("c10d::send", "c10d::recv_"):
            ranks = tuple(sorted((dist.get_rank(), args[2])))
        self.sent[ranks] += round(share * most)

    def _note_copy(self, one: Tensor, other: Tensor) -> None:
        if one.device != other.device:
            self.moved += one.numel() * one.element_size()

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.sent + other.sent, self.moved + other.moved)

    def times(self, factor: float) -> Work:
        """So many times as much."""
        sent = Counter({ranks: round(nbytes * factor) for ranks, nbytes in self.sent.items()})
        return Work(round(self.flops * factor), sent, round(self.moved * factor))


def extended_work(low: Work, high: Work, times: float) -> Work:
    """`low`, and so many times what `high` has more; nothing becomes negative."""
    groups = low.sent.keys() | high.sent.keys()
    sent = {ranks: low.sent[ranks] + times * (high.sent[ranks] - low.sent[ranks]) for ranks in groups}
    flops, moved = low.flops + times * (high.flops - low.flops), low.moved + times * (high.moved - low.moved)
    sent_of = Counter({ranks: max(0, round(nbytes)) for ranks, nbytes in sent.items()})
    return Work(max(0, round(flops)), sent_of, max(0, round(moved)))


def _group(args: Any) -> Any:
    """The process group among the arguments of a collective."""
    found = (argument for argument in args if isinstance(argument, torch.ScriptObject))
    return dist.ProcessGroup.unbox(next(one for one in found if "ProcessGroup" in str(one._type())))


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape))


_TO = torch.ops.aten._to_copy.default
_COPIES = (_TO, torch.ops.aten.copy_.default)

# The table of torch has those of GPUs only.
_FLOPS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _attention_backward,
}

# Bytes through a rank's link in a ring of k ranks, per byte of the largest tensor of the call.
_PASSES: dict[str, Callable[[int], float]] = {
    "allreduce_": lambda k: 2 * (k - 1) / k,
    "_allgather_base_": lambda k: (k - 1) / k,
    "allgather_into_tensor_coalesced_": lambda k: (k - 1) / k,
    "_reduce_scatter_base_": lambda k: (k - 1) / k,
    "broadcast_": lambda k: 1.0,
    "reduce_": lambda k: 1.0,
    "alltoall_base_": lambda k: (k - 1) / k,
    "send": lambda k: 1.0,
    "recv_": lambda k: 0.0,  # links work in both directions at once
}
