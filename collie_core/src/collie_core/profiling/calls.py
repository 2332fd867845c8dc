"""Every exchange with other ranks, named so that all who take part in it give it the same name."""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch.distributed as dist

from collie_core.compat import collectives_watched
from collie_core.profiling.clock import NO_CALL, Clock

if TYPE_CHECKING:
    from collie_core.topology import Topology

_ONE_TO_ONE = ("send", "recv")


class Calls:
    """Times the exchanges of this rank. A call is followed to where its result is waited for.

    Names count the calls of a group, or of a pair of ranks, from when they are watched: all ranks of a group call in
    the same order, as torch demands.
    """

    def __init__(self, clock: Clock, topology: Topology) -> None:
        self._clock = clock
        self._topology = topology
        self._counts: Counter[str] = Counter()
        self._numbers: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # of work that is under way
        self._together: list[str] | None = None  # names of calls that are sent off as one

    def watched(self) -> AbstractContextManager[None]:
        """Inside, calls are timed."""
        return collectives_watched(self._call, self._wait)

    def _call(self, method: str, function: Any, group: Any, *args: Any, **kwargs: Any) -> Any:
        if method == "_start_coalescing":
            self._together = []
            return function(group, *args, **kwargs)
        if method == "_end_coalescing":
            names, self._together = tuple(self._together or ()), None
        elif self._together is not None:
            self._together.append(self._name(method, group, args))
            return function(group, *args, **kwargs)
        else:
            names = (self._name(method, group, args),)
        number = self._clock.call(names, self._axis(names, group))
        with self._clock.phase("communication", number):
            work = function(group, *args, **kwargs)
        if isinstance(work, dist.Work):
            self._numbers[work] = number
        return work

    def _wait(self, function: Any, work: Any, *args: Any, **kwargs: Any) -> Any:
        with self._clock.phase("communication", self._numbers.get(work, NO_CALL)):
            return function(work, *args, **kwargs)

    def _name(self, method: str, group: Any, args: tuple[Any, ...]) -> str:
        name = group.group_name
        if method in _ONE_TO_ONE:
            _, peer, tag = args
            source, target = (group.rank(), peer) if method == "send" else (peer, group.rank())
            name += f":{source}>{target}:{tag}"
        self._counts[name] += 1
        return f"{name}#{self._counts[name]}"

    def _axis(self, names: tuple[str, ...], group: Any) -> str:
        """The axis of the topology along which the ranks of a call lie; "all" where it is none."""
        if self._topology.pp.size > 1 and any(">" in name for name in names):  # only stages call one another
            return "pp"
        ranks = tuple(dist.get_process_group_ranks(group))
        axes = {"tp": self._topology.tp, "pp": self._topology.pp, "dp": self._topology.dp}
        return next((name for name, axis in axes.items() if axis.size > 1 and axis.ranks == ranks), "all")
