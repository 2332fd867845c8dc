"""Which tensors exist at every moment, seen from the operations that make them.

It works on real tensors and on fake ones alike, and takes no memory of its own to speak of: a storage is one number
from its first tensor until the last tensor on it is gone.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from collie_core.plan.work import Work

if TYPE_CHECKING:
    from numpy.typing import NDArray

COMPONENTS = (
    "weights",
    "gradients",
    "optimizer state",
    "activations",
    "logits and loss",
    "communication",
    "temporary",
    "framework",
)
PHASES = ("setup", "forward", "backward", "update")
HOST = torch.device("cpu")

Where = Literal["device", "host"]
"""The memory that a rank computes in, and the main memory of its machine. On a CPU the first is all there is."""
WHERE: tuple[Where, ...] = get_args(Where)


INTERNAL: dict[Any, Callable[..., int]] = {
    torch.ops.aten.logsumexp.default: lambda tensor, *_: tensor.numel() * tensor.element_size()
}
"""Operations that copy an argument out of the sight of a trace: the bytes that they take, from their arguments."""


@dataclass
class Storage:
    """What is known of the memory of one or several tensors."""

    nbytes: int
    phase: str  # in which it was made
    shape: tuple[int, ...]  # of its first tensor
    where: Where = "device"
    component: str = ""  # as it was marked; "": not
    sent: bool = False  # whether a collective has read or written it


@dataclass(frozen=True)
class Peak:
    """The moment of a phase, or of all, at which the most bytes were held."""

    components: dict[str, int]  # bytes
    phase: str

    @property
    def total(self) -> int:
        """Bytes of all components."""
        return sum(self.components.values())


Operation = tuple[str, frozenset[tuple[int, ...]]]
"""Its name, and the shapes of what has come or gone since the one before."""


@dataclass(frozen=True)
class Section:
    """A part of a trace in one phase: its operations in order, and the most that was held at each of them."""

    phase: str
    operations: tuple[Operation, ...]
    held: dict[Where, NDArray[np.int64]]
    """Bytes [operations, components] at the moment of each operation at which they add up to most."""


@dataclass
class MemoryTrace(TorchDispatchMode):
    """A log of storages that come and go, while it is entered.

    Args:
        granularity: bytes that storages on the device are rounded up to: 512 in torch's allocator of GPU memory, 1 on
            a CPU.
        device: what lies elsewhere is in host memory.
        rounds_pinned: whether pinned tensors take the room that torch gives them, a power of two bytes. See
            torch/include/ATen/core/CachingHostAllocator.h, `allocate`.
    """

    granularity: int = 1
    device: torch.device = HOST
    rounds_pinned: bool = False
    phase: str = "setup"
    vocabularies: set[int] = field(default_factory=set)  # last dimensions of logits
    storages: list[Storage] = field(default_factory=list)
    work: Work | None = None  # counts operations too

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._log: list[tuple[int, int, str]] = []  # (number of a storage, bytes that came or went, phase)
        self._live: dict[int, tuple[int, Any]] = {}  # by address: number, and a reference that tells its end
        self._operations: list[tuple[str, int]] = []  # (name, events of the log at its end)
        self._begin = 0
        self._paused = self._pinning = False

    def begin(self) -> None:
        """Peaks are those from here on; what exists now counts among them."""
        self._begin = len(self._log)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, what operations make is not counted."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def pinned(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor in pinned host memory."""
        self._pinning = self.rounds_pinned
        try:
            return tensor.clone()
        finally:
            self._pinning = False

    def mark(self, tensors: Iterable[Tensor | None], component: str) -> None:
        """Say what tensors are for; what is marked already stays so."""
        for tensor in tensors:
            if tensor is not None and (number := self._number(tensor)) is not None:
                self.storages[number].component = self.storages[number].component or component

    def peaks(self, where: Where = "device") -> dict[str, Peak]:
        """The peak of each phase that has passed, from `begin` on."""
        held, most = 0, dict.fromkeys(PHASES, -1)
        moments: dict[str, int] = {}
        for moment, (number, change, phase) in enumerate(self._log):
            held += change if self.storages[number].where == where else 0
            if moment >= self._begin and held > most[phase]:
                most[phase], moments[phase] = held, moment
        return {phase: self._at(moment, where) for phase, moment in moments.items()}

    def sections(self) -> list[Section]:
        """What was held at each operation from `begin` on, in parts of one phase."""
        changes = {where: np.zeros((len(self._log) + 1, len(COMPONENTS)), np.int64) for where in WHERE}
        for moment, (number, change, _) in enumerate(self._log):
            storage = self.storages[number]
            changes[storage.where][moment + 1, COMPONENTS.index(self._component(storage))] = change
        held = {where: np.cumsum(each, 0) for where, each in changes.items()}
        found = []
        for phase, spans in itertools.groupby(self._spans(), key=lambda span: self._log[span[1]][2]):
            listed = list(spans)
            operations = tuple((name, self._shapes(begin, end)) for begin, end, name in listed)
            found.append(Section(phase, operations, {where: _highest(each, listed) for where, each in held.items()}))
        return found

    def _shapes(self, begin: int, end: int) -> frozenset[tuple[int, ...]]:
        return frozenset(self.storages[number].shape for number, *_ in self._log[begin : end + 1])

    def _spans(self) -> Iterator[tuple[int, int, str]]:
        """First and last event of each operation that has any, with those before it, and its name; of one phase."""
        ends = {end - 1: name for name, end in self._operations}
        begin, last = self._begin, len(self._log) - 1
        for moment in range(self._begin, last + 1):
            if moment in ends or moment == last or self._log[moment + 1][2] != self._log[moment][2]:
                yield begin, moment, ends.get(moment, "")
                begin = moment + 1

    def _at(self, moment: int, where: Where) -> Peak:
        """What was held after an event of the log."""
        held: dict[int, int] = {}
        for number, change, _ in itertools.islice(self._log, moment + 1):
            if self.storages[number].where == where:
                held[number] = held.get(number, 0) + change
        found = dict.fromkeys(COMPONENTS, 0)
        for number, nbytes in held.items():
            found[self._component(self.storages[number])] += nbytes
        return Peak(found, self._log[moment][2])

    def _component(self, storage: Storage) -> str:
        if storage.component:
            return storage.component
        if storage.sent and storage.phase != "forward":
            return "communication"
        if storage.phase in ("forward", "backward") and storage.shape and storage.shape[-1] in self.vocabularies:
            return "logits and loss"
        return {"setup": "framework", "forward": "activations"}.get(storage.phase, "temporary")

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the wrapper that says so takes as long as an operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.note(func, args, kwargs or {}, result)
        return result

    def note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """An operation that was just done."""
        if self._paused or func.namespace == "prim":  # which asks for attributes
            return
        for tensor in (result,) if isinstance(result, Tensor) else tree_iter(result):
            if isinstance(tensor, Tensor):
                self._number(tensor)
        if self.work is not None:
            self.work.note(func, args, kwargs, result)
        if (internal := INTERNAL.get(func)) is not None:
            self._pass_by(internal(*args), result)
        if func.namespace == "c10d":
            for tensor in tree_iter((args, kwargs)):
                if isinstance(tensor, Tensor) and (number := self._number(tensor)) is not None:
                    self.storages[number].sent = True
        if not self._operations or len(self._log) > self._operations[-1][1]:
            self._operations.append((str(func), len(self._log)))

    def _number(self, tensor: Tensor) -> int | None:
        """Of the storage of a tensor, which comes into the log when it is new; None where there are no bytes."""
        if tensor.layout != torch.strided:
            return None
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self._live:
            device = _device_of(tensor)
            if storage.nbytes() == 0 or device.type == "meta":
                return None
            number, where = len(self.storages), self._where(device)
            nbytes = self._room(storage.nbytes(), where)
            self.storages.append(Storage(nbytes, self.phase, tuple(tensor.shape), where))
            self._live[address] = number, weakref.ref(storage, lambda _: self._end(address))
            self._log.append((number, nbytes, self.phase))
        return self._live[address][0]

    def _where(self, device: torch.device) -> Where:
        return "device" if device == self.device else "host"

    def _room(self, nbytes: int, where: Where) -> int:
        """What an allocator takes for so many bytes."""
        if where == "device":
            return -(-nbytes // self.granularity) * self.granularity
        return 1 << (nbytes - 1).bit_length() if self._pinning else nbytes

    def _pass_by(self, nbytes: int, result: Tensor) -> None:
        """Memory that an operation takes for itself and gives back."""
        number = len(self.storages)
        where = self._where(_device_of(result))
        self.storages.append(Storage(nbytes, self.phase, tuple(result.shape), where, "temporary"))
        self._log += [(number, nbytes, self.phase), (number, -nbytes, self.phase)]

    def _end(self, address: int) -> None:
        number, _ = self._live.pop(address)
        self._log.append((number, -self.storages[number].nbytes, self.phase))


def _device_of(tensor: Tensor) -> torch.device:
    """Without asking the tensor: a fake one would put the question through all modes, at the cost of an operation."""
    return tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device


def _highest(held: NDArray[np.int64], spans: Iterable[tuple[int, int, str]]) -> NDArray[np.int64]:
    """Of each span the row with the largest sum, of those after its first event to after its last one."""
    total = held.sum(1)
    return held[[begin + 1 + int(total[begin + 1 : end + 2].argmax()) for begin, end, _ in spans]]
