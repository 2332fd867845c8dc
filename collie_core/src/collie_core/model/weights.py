"""Weights in and out of a model that several ranks hold together: each reads its own slices, the main rank writes."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from collie_core.errors import ModelError, RunError
from collie_core.model.boxes import Box as Box
from collie_core.model.boxes import Piece as Piece
from collie_core.model.boxes import common, moved, replaced, shape_of, slices, whole
from collie_core.model.files import Checkpoint as Checkpoint
from collie_core.model.files import DiskFile, Kind, OpenFile, TensorFolder
from collie_core.model.layout import canonical as canonical
from collie_core.model.layout import file_shapes, shorten
from collie_core.model.layout import layout as layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from collie_core.model.part import Part
    from collie_core.model.partition import Partition, Placement
    from collie_core.topology import Axis, Topology

Read = Callable[["tuple[int, int] | None"], Tensor]
"""(rows [begin, end) of dimension 0, None: all) -> those of this rank's shard, newly made on the CPU."""

Store = Callable[[nn.Module, str, "tuple[int, ...]", Read], None]
"""(module, name of the parameter in it, shape of this rank's shard, read): puts one parameter into its module."""

GATHERED = 1 << 19  # entries of a shard that are sent at a time: freed blocks of this size are used again

Gathered = Callable[[Sequence[nn.Parameter]], AbstractContextManager[Any]]
"""A context in which parameters hold all that is theirs on this rank; collective over data-parallel ranks."""


def assign(module: nn.Module, name: str, shape: tuple[int, ...], read: Read) -> None:
    """The `Store` that keeps all of this rank's shard."""
    old = module._parameters[name]
    assert old is not None
    value = read(None)
    new = nn.Parameter(value, requires_grad=old.requires_grad and value.is_floating_point())
    new.__dict__.update(old.__dict__)  # marks that the partition has set
    module._parameters[name] = new


def stays_whole(parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
    """The `Gathered` of an engine that partitions no parameters."""
    return nullcontext()


# -- in -----------------------------------------------------------------------------------------------------------


def load(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    layout: Mapping[str, Sequence[Piece]],
    partition: Partition,
    topology: Topology,
    *,
    dtype: torch.dtype,
    store: Store = assign,
) -> None:
    """Fill this rank's part of `model` (cut and sharded, on the meta device) with its slices of a checkpoint.

    No more than one tensor exists beside the model's own at a time. Floating-point parameters become `dtype`, except
    those that transformers keeps in float32. Collective.

    Raises:
        ModelError: on every rank, with the names of weights that are not finite; or a file cannot be read.
    """
    damaged: set[str] = set()
    dtypes = Dtypes(model, dtype)
    for module, leaf, name in own_parameters(model, partition):
        pieces = layout[name]
        kind = dtypes.of(name, checkpoint.dtype(pieces[0].key))
        reader = FileReader(checkpoint, pieces, partition.placements[name], topology.tp, kind)
        store(module, leaf, reader.shape, reader)
        if not reader.finite:
            damaged.add(name)
    tie(model, partition)
    for name, buffer in model.named_buffers():
        if name in layout:
            for piece in layout[name]:
                buffer[slices(piece.target)] = checkpoint.read(piece.key, piece.source)
    names = sorted(set().union(*topology.gather_objects(damaged)))
    if names:
        raise ModelError(f"the weights of {checkpoint.name} are damaged: not finite: {shorten(names)}")


def tie(model: nn.Module, partition: Partition) -> None:
    """Let tied parameters be one again, where this rank has both."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, placement in partition.placements.items():
        module, _, leaf = name.rpartition(".")
        owner, _, source = placement.tied_to.rpartition(".")
        if placement.tied_to and module in modules and source in getattr(modules.get(owner), "_parameters", {}):
            modules[module]._parameters[leaf] = modules[owner]._parameters[source]


class Dtypes:
    """The precision of each tensor of a model that computes in `dtype`."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.kept = model._get_dtype_plan(dtype)  # part of a name -> float32

    def of(self, name: str, found: torch.dtype) -> torch.dtype:
        """For a tensor that has the type `found`."""
        if not found.is_floating_point:
            return found
        return next((kept for part, kept in self.kept.items() if re.search(part.replace("*", ".*"), name)), self.dtype)


def local_boxes(placement: Placement, size: int, rank: int) -> list[tuple[Box, Box]]:
    """The boxes of the whole tensor that a tensor-parallel rank holds, each with its box in the shard."""
    box = whole(placement.shape)
    if placement.rule is None:
        return [(box, box)]
    dim, start, boxes = placement.rule.dim, 0, []
    for begin, end in placement.rule.intervals(size, rank):
        boxes.append((replaced(box, dim, (begin, end)), replaced(box, dim, (start, start + end - begin))))
        start += end - begin
    return boxes


class ShardReader(ABC):
    """Makes rows of this rank's shard of one parameter. See `Read`."""

    def __init__(self, placement: Placement, axis: Axis, dtype: torch.dtype) -> None:
        self.name = placement.name
        self.boxes = local_boxes(placement, axis.size, axis.rank)
        self.shape = placement.local_shape(axis.size, axis.rank)
        self.dtype = dtype

    @abstractmethod
    def fill(self, values: Tensor, there: Box, here: Box) -> None:
        """Copy box `there` of the whole tensor to box `here` of `values`."""

    def __call__(self, rows: tuple[int, int] | None = None) -> Tensor:
        wanted = whole(self.shape)
        if rows is not None and wanted:
            wanted = replaced(wanted, 0, rows)
        values = torch.empty(shape_of(wanted), dtype=self.dtype)
        for there, here in self.boxes:
            if (part := common(here, wanted)) is not None:
                self.fill(values, moved(part, here, there), moved(part, wanted, whole(values.shape)))
        return values


class FileReader(ShardReader):
    """Straight from the files; `finite` says whether all that was read is."""

    def __init__(
        self, checkpoint: Checkpoint, pieces: Sequence[Piece], placement: Placement, axis: Axis, dtype: torch.dtype
    ) -> None:
        super().__init__(placement, axis, dtype)
        self.checkpoint, self.pieces = checkpoint, pieces
        self.finite = True

    def fill(self, values: Tensor, there: Box, here: Box) -> None:
        """See `ShardReader`."""
        for piece in self.pieces:
            if (part := common(piece.target, there)) is not None:
                found = self.checkpoint.read(piece.key, moved(part, piece.target, piece.source))
                values[slices(moved(part, there, here))] = found

    def __call__(self, rows: tuple[int, int] | None = None) -> Tensor:
        values = super().__call__(rows)
        self.finite = self.finite and is_finite(values)
        return values


def is_finite(values: Tensor) -> bool:
    """Whether a tensor holds neither infinities nor NaN; takes no memory to speak of."""
    if not values.dtype.is_floating_point or values.numel() == 0:
        return True
    if values.dtype.itemsize > 1:
        return all(bool(end.isfinite()) for end in values.aminmax())
    return all(bool(part.float().isfinite().all()) for part in values.flatten().split(1 << 20))


def own_parameters(model: nn.Module, partition: Partition) -> Iterator[tuple[nn.Module, str, str]]:
    """The parameters that this rank fills: (module, name in it, name in the model)."""
    for path, module in list(model.named_modules()):
        for leaf, parameter in list(module._parameters.items()):
            name = f"{path}.{leaf}" if path else leaf
            if parameter is not None and not partition.placements[name].tied_to:
                yield module, leaf, name


# -- out ----------------------------------------------------------------------------------------------------------


def whole_tensors(
    model: nn.Module, part: Part, gathered: Gathered = stays_whole
) -> Iterator[tuple[str, Tensor | None]]:
    """Every tensor of the whole model by name, in its order: its values on the main rank, None on the others.

    Collective: every rank goes through all of it. A value may be a view, good until the next one is asked for.
    """
    held = _named_tensors(model)
    yield from _stream(held, part.partition.placements, part.topology, gathered, _inventory(held, part))


def stream(
    held: Mapping[str, Tensor], placements: Mapping[str, Placement], topology: Topology, gathered: Gathered
) -> Iterator[tuple[str, Tensor | None]]:
    """The same for tensors that were added to a model: `held` are those of this rank, `placements` all there are."""
    mine: dict[str, tuple[int, Kind]] = {}
    if topology.dp.rank == topology.tp.rank == 0:
        mine = {name: (topology.pp.rank, Kind(placements[name].shape, held[name].dtype)) for name in held}
    everyone = {name: found for stage in topology.gather_objects(mine) for name, found in stage.items()}
    inventory = {name: everyone[name] for name in placements}
    yield from _stream(held, placements, topology, gathered, inventory)


def save(
    folder: Path,
    model: PreTrainedModel,
    part: Part,
    gathered: Gathered = stays_whole,
    *,
    dtype: torch.dtype,
    max_shard_bytes: float = 5e9,
    held: Mapping[str, Tensor] | None = None,
    open_file: OpenFile = DiskFile,
) -> None:
    """Write the weights of the whole model to `folder`, in the layout in which they were read. Collective.

    Every tensor goes to its place in the files as soon as it is gathered, so no rank holds more than one. `held` are
    this rank's tensors by name, where they are not simply those of `model`; `open_file` says where bytes go.

    Raises:
        RunError: the main rank cannot write, on every rank.
    """
    held = _named_tensors(model) if held is None else held
    inventory = _inventory(held, part)
    dtypes = Dtypes(model, dtype)
    failure: OSError | None = None
    files: TensorFolder | None = None
    if part.topology.is_main:
        try:
            files = TensorFolder(folder, _kinds(part, inventory, dtypes), max_shard_bytes, open_file)
        except OSError as error:
            failure = error
    for name, value in _stream(held, part.partition.placements, part.topology, gathered, inventory):
        if value is None or files is None or failure is not None:
            continue  # after a failure too: the other ranks wait in the next gather
        try:
            for piece in part.layout[name]:
                files.write(piece.key, piece.source, value[slices(piece.target)].reshape(shape_of(piece.source)))
        except OSError as error:
            failure = error
        del value  # before the next one is gathered
    if files is not None:
        try:
            files.close(complete=failure is None)
        except OSError as error:
            failure = failure or error
    said = part.topology.gather_objects("" if failure is None else str(failure))[0]
    if said:
        raise RunError(f"the model cannot be written: {said}") from failure


def _inventory(held: Mapping[str, Tensor], part: Part) -> dict[str, tuple[int, Kind]]:
    """Tensor -> the stage that holds it, and what it is when whole. Collective."""
    topology, placements = part.topology, part.partition.placements
    mine: dict[str, tuple[int, Kind]] = {}
    if topology.dp.rank == topology.tp.rank == 0:
        for name, tensor in held.items():
            if name in part.layout:
                shape = placements[name].shape if name in placements else tuple(tensor.shape)
                mine[name] = (topology.pp.rank, Kind(shape, tensor.dtype))
    everyone: dict[str, tuple[int, Kind]] = {}
    for stage in topology.gather_objects(mine):
        for name, found in stage.items():
            everyone.setdefault(name, found)  # a buffer that every stage has is the first one's
    return {name: everyone[name] for name in part.layout}


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_buffers()), **dict(model.named_parameters())}


def _kinds(part: Part, inventory: Mapping[str, tuple[int, Kind]], dtypes: Dtypes) -> dict[str, Kind]:
    """The tensors of the files, in the model's order."""
    shapes = file_shapes(part.layout)
    return {
        piece.key: Kind(shapes[piece.key], dtypes.of(name, inventory[name][1].dtype))
        for name, pieces in part.layout.items()
        for piece in pieces
    }


def _stream(
    held: Mapping[str, Tensor],
    placements: Mapping[str, Placement],
    topology: Topology,
    gathered: Gathered,
    inventory: Mapping[str, tuple[int, Kind]],
) -> Iterator[tuple[str, Tensor | None]]:
    for name, (stage, kind) in inventory.items():
        tensor = held.get(name) if topology.pp.rank == stage else None
        with gathered([tensor]) if isinstance(tensor, nn.Parameter) else nullcontext():
            yield name, sent_to_main(tensor, placements.get(name), stage, kind, topology)


def sent_to_main(
    tensor: Tensor | None, placement: Placement | None, stage: int, kind: Kind, topology: Topology
) -> Tensor | None:
    """A tensor of a stage, whole on the main rank; None on the others. Collective.

    Args:
        tensor: this rank's tensor-parallel part, which counts on the first data-parallel rank of the stage.
        placement: how it is cut; None: it is not.
        stage: the pipeline stage that holds it.
        kind: what it is when whole.
        topology: of the run.
    """
    value = None
    if tensor is not None and topology.dp.rank == 0:
        value = _joined(tensor.detach(), placement, topology.tp)
    if topology.dp.rank == topology.tp.rank == 0:
        value = _sent_to_first(value, stage, kind, topology)
    return value if topology.is_main else None


def _joined(shard: Tensor, placement: Placement | None, axis: Axis) -> Tensor | None:
    """The whole tensor on the first tensor-parallel rank, from the shards of all; None on the others."""
    if axis.size == 1:
        return shard
    if placement is None or placement.rule is None:
        return shard if axis.rank == 0 else None
    dim = placement.rule.dim
    sizes = [placement.local_shape(axis.size, rank) for rank in range(axis.size)]
    padded = replaced(whole(sizes[0]), dim, (0, max(size[dim] for size in sizes)))
    boxes = [local_boxes(placement, axis.size, rank) for rank in range(axis.size)]
    value = shard.new_empty(placement.shape) if axis.rank == 0 else None
    for rows in _blocks(padded):
        block = replaced(padded, 0, rows)
        received = _gathered_block(shard, block, axis)
        if value is None:
            continue
        for part, places in zip(received, boxes, strict=True):
            for there, here in places:
                if (kept := common(here, block)) is not None:
                    value[slices(moved(kept, here, there))] = part[slices(moved(kept, block, whole(part.shape)))]
    return value


def _blocks(box: Box) -> Iterator[tuple[int, int]]:
    """Rows of a box, so few that a block of them is small beside a large tensor."""
    (begin, end), *rest = box
    step = max(1, GATHERED // max(1, math.prod(shape_of(tuple(rest)))))
    for start in range(begin, end, step):
        yield start, min(start + step, end)


def _gathered_block(shard: Tensor, block: Box, axis: Axis) -> list[Tensor]:
    """A block of every rank's shard on the first rank; what a smaller shard lacks of it holds anything."""
    mine = shard[slices(block)]
    if mine.shape != shape_of(block):
        wide = shard.new_empty(shape_of(block))
        wide[slices(whole(mine.shape))] = mine
        mine = wide
    received = [mine.new_empty(shape_of(block)) for _ in range(axis.size)] if axis.rank == 0 else None
    dist.gather(mine.contiguous(), received, dst=axis.ranks[0], group=axis.group)
    return received or []


def _sent_to_first(value: Tensor | None, stage: int, kind: Kind, topology: Topology) -> Tensor | None:
    """From the stage that holds it to the first one."""
    axis = topology.pp
    if stage == 0:
        return value
    if value is not None:
        dist.send(value.to(topology.device).contiguous(), axis.ranks[0], group=axis.group)
    elif axis.rank == 0:
        value = torch.empty(kind.shape, dtype=kind.dtype, device=topology.device)
        dist.recv(value, axis.ranks[stage], group=axis.group)
    return value if axis.rank == 0 else None
