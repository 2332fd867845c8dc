"""Where every tensor of a model lies in its files, found from headers alone.

A family that declares `weights` is laid out by them. For any other, transformers' own conversions (renames, experts
that are stacked, fused matrices) run over tensors that have a shape and no values: a `Mosaic` remembers of which boxes
of which other tensors it is made. So the same pieces serve reading and writing, and any rank can read just its part.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, cast

import torch

from collie_core.errors import ModelError
from collie_core.model.boxes import Box, Piece, common, moved, replaced, shape_of, volume, whole
from collie_core.model.partition import pattern

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from collie_core.hookspecs import ModelFamily
    from collie_core.model.family import Source
    from collie_core.model.files import Checkpoint

Layout = dict[str, list[Piece]]
"""Tensor of the model, in its order -> its pieces."""


def layout(model: PreTrainedModel, family: ModelFamily, checkpoint: Checkpoint | None) -> Layout:
    """Where the parameters and persistent buffers of the whole `model` (on the meta device) lie in a checkpoint.

    Without a checkpoint: where an export puts them. Tied parameters are left out.

    Raises:
        ModelError: tensors are missing, unexpected or of another shape, all at once; or a conversion that
            transformers has for them cannot be made box by box.
    """
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    aliases = _aliases(model)
    own = [name for name in shapes if name not in aliases]
    declared = getattr(family, "weights", {})
    if checkpoint is None:
        found = _declared(model, declared, {name: shapes[name] for name in own}) if declared else _exported(model, own)
        _check_covered(found, family)
        return found
    if declared:
        found = _declared(model, declared, shapes, checkpoint)
        used = {piece.key for pieces in found.values() for piece in pieces}
        unexpected = [key for key in checkpoint.keys() if key not in used]  # noqa: SIM118  (no mapping)
    else:
        found, unexpected = _converted(model, shapes, checkpoint)
    for alias, owner in aliases.items():  # a file may hold either or both
        pieces = found.pop(alias, None)
        if pieces is not None:
            found.setdefault(owner, pieces)
    found = {name: found[name] for name in own if name in found}
    unexpected = [key for key in unexpected if pattern(key) not in getattr(family, "computed", ())]
    problems = _missing_and_unexpected(model, own, found, unexpected) + _misshapen(shapes, found, checkpoint)
    if problems:
        raise ModelError(f"the weights of {checkpoint.name} do not fit {family.model_type}: " + "; ".join(problems))
    _check_covered(found, family)
    return found


def canonical(found: Mapping[str, Sequence[Piece]], prefix: str) -> Layout:
    """The layout in which to write what was read: files of a bare base model get the prefix of the whole one."""
    return {
        name: [replace(piece, key=name) if name == f"{prefix}.{piece.key}" else piece for piece in pieces]
        for name, pieces in found.items()
    }


# -- declared by the family ---------------------------------------------------------------------------------------


def _declared(
    model: PreTrainedModel,
    declared: Mapping[str, Source],
    shapes: Mapping[str, tuple[int, ...]],
    checkpoint: Checkpoint | None = None,
) -> Layout:
    """The layout that a family declares; of a tensor that it does not mention, the name is the key."""
    present = None if checkpoint is None else set(checkpoint.keys())
    found: Layout = {}
    for name, shape in shapes.items():
        source = declared.get(pattern(name))
        key = name if source is None else _numbered(source.key, name)
        if checkpoint is not None and present is not None:
            if key not in present:
                continue
            shape = checkpoint.shape(key)  # so that a tensor that does not fit shows by the shape of its target
        box = whole(shape)
        rows = [box[0]] if source is None or source.rows is None or not box else source.rows(model.config)
        found[name] = _rows_of(key, box, rows) if box else [Piece(key, box, box)]
    return found


def _numbered(key: str, name: str) -> str:
    """The key with the numbers of a name in the places of its `*`."""
    numbers = iter(re.findall(r"(?<=\.)\d+(?=\.|$)", name))
    return re.sub(r"\*", lambda _: next(numbers), key)


def _rows_of(key: str, box: Box, rows: Sequence[tuple[int, int]]) -> list[Piece]:
    """Rows of a tensor, one interval under another."""
    ends = accumulate(end - begin for begin, end in rows)
    return [
        Piece(key, replaced(box, 0, (begin, end)), replaced(box, 0, (stop - (end - begin), stop)))
        for (begin, end), stop in zip(rows, ends, strict=True)
    ]


# -- converted by transformers ------------------------------------------------------------------------------------


def _converted(
    model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]], checkpoint: Checkpoint
) -> tuple[Layout, list[str]]:
    """The layout of a checkpoint as `from_pretrained` reads it, and the keys that it has no use for."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {source: converter for converter in converters for source in converter.source_patterns}
    names = dict.fromkeys(shapes, True)  # only asked whether it has a name
    found: Layout = {}
    groups: dict[str, WeightConverter] = {}
    unexpected = []
    for key in sorted(checkpoint.keys(), key=dot_natural_key):
        prefix = model.base_model_prefix
        name, source = rename_source_key(key, renamings, converters, prefix, names)
        if name not in names and key in names:  # it has the name of the model already
            name, source = rename_source_key(key, [], [], prefix, names)
        if name not in names or name in found:
            unexpected.append(key)
        elif source is None:
            box = whole(checkpoint.shape(key))
            found[name] = [Piece(key, box, box)]
        else:
            group = groups.setdefault(name, deepcopy(by_pattern[source]))
            group.add_tensor(name, key, source, cast(Any, Mosaic.of(key, checkpoint.shape(key))))
    for name, group in groups.items():
        for target, mosaic in _convert(group, name, model).items():
            found[target] = mosaic.pieces
    return found, unexpected


def _convert(group: Any, name: str, model: PreTrainedModel) -> dict[str, Mosaic]:
    keys = sorted(key for keys in group.layer_targets.values() for key in keys)
    try:
        made = group.convert(name, model=model, config=model.config)
    except (NotImplementedError, AttributeError, TypeError, ValueError) as error:
        steps = ", ".join(type(operation).__name__ for operation in group.operations)
        raise ModelError(
            f"{name} cannot be read from {shorten(keys)}: of transformers' conversion ({steps}), {error}; "
            "load the model with transformers, save it with save_pretrained(save_original_format=False), and train that"
        ) from error
    return {target: value[0] if isinstance(value, list) else value for target, value in made.items()}


def _exported(model: PreTrainedModel, names: Sequence[str]) -> Layout:
    """The layout that `save_pretrained` gives a model with weights of its own: the original format of its family."""
    from transformers.core_model_loading import revert_weight_conversion

    state = model.state_dict()
    mosaics: Any = {name: Mosaic.of(name, state[name].shape) for name in names}
    try:
        written = revert_weight_conversion(model, mosaics)
    except (NotImplementedError, AttributeError, TypeError, ValueError):
        written = mosaics  # not in boxes: under the model's own names, which transformers reads as well
    found: Layout = {name: [] for name in names}
    for key, mosaic in written.items():
        for piece in mosaic.pieces:
            found[piece.key].append(Piece(key, source=piece.target, target=piece.source))
    return found


class Mosaic:
    """A tensor without values: its shape, and the boxes of other tensors that it is made of.

    torch's own functions for joining and splitting work on it; any other raises NotImplementedError.
    """

    def __init__(self, shape: Sequence[int], pieces: list[Piece]) -> None:
        self.shape = torch.Size(shape)
        self.pieces = pieces

    @classmethod
    def of(cls, key: str, shape: Sequence[int]) -> Mosaic:
        """The whole of one tensor."""
        return cls(shape, [Piece(key, whole(shape), whole(shape))])

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    def size(self, dim: int) -> int:
        """The length of a dimension."""
        return self.shape[dim]

    def contiguous(self) -> Mosaic:
        """Itself: it has no memory."""
        return self

    def squeeze(self, dim: int = 0) -> Mosaic:
        """Without the leading dimension, which is 1 long. Older transformers mean that one and name none."""
        if dim != 0 or self.shape[0] != 1:
            raise NotImplementedError(f"squeeze(dim={dim}) does not keep boxes")
        # Turned round, these are pieces whose source lacks the leading dimension.
        return Mosaic(self.shape[1:], [replace(piece, target=piece.target[1:]) for piece in self.pieces])

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        operation = _OPERATIONS.get(function)
        if operation is None:
            raise NotImplementedError(f"{getattr(function, '__name__', function)} does not keep boxes")
        return operation(*args, **(kwargs or {}))


def _stack(mosaics: Sequence[Mosaic], dim: int = 0) -> Mosaic:
    if dim != 0:
        raise NotImplementedError(f"stack(dim={dim}) does not keep boxes")
    lifted = [
        Mosaic((1, *mosaic.shape), [replace(piece, target=((0, 1), *piece.target)) for piece in mosaic.pieces])
        for mosaic in mosaics
    ]
    return _cat(lifted)


def _cat(mosaics: Sequence[Mosaic], dim: int = 0) -> Mosaic:
    dim %= mosaics[0].ndim
    if len({mosaic.shape[:dim] + mosaic.shape[dim + 1 :] for mosaic in mosaics}) > 1:
        raise ValueError(f"the shapes {shorten([str(list(mosaic.shape)) for mosaic in mosaics])} differ")
    pieces, start = [], 0
    for mosaic in mosaics:
        for piece in mosaic.pieces:
            begin, end = piece.target[dim]
            pieces.append(replace(piece, target=replaced(piece.target, dim, (begin + start, end + start))))
        start += mosaic.shape[dim]
    shape = list(mosaics[0].shape)
    shape[dim] = start
    return Mosaic(shape, pieces)


def _split(mosaic: Mosaic, sizes: int | Sequence[int], dim: int = 0) -> tuple[Mosaic, ...]:
    dim %= mosaic.ndim
    length = mosaic.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, length - start) for start in range(0, length, sizes)]
    if sum(sizes) != length:
        raise ValueError(f"{length} entries cannot be split into {list(sizes)}")
    parts, start = [], 0
    for size in sizes:
        box = replaced(whole(mosaic.shape), dim, (start, start + size))
        pieces = []
        for piece in mosaic.pieces:
            kept = common(piece.target, box)
            if kept is not None:
                if len(piece.source) > len(piece.target):
                    raise NotImplementedError("splitting what was squeezed does not keep boxes")
                source = moved(kept, piece.target, piece.source)
                pieces.append(Piece(piece.key, source, moved(kept, box, whole(shape_of(box)))))
        parts.append(Mosaic(shape_of(box), pieces))
        start += size
    return tuple(parts)


def _chunk(mosaic: Mosaic, chunks: int, dim: int = 0) -> tuple[Mosaic, ...]:
    return _split(mosaic, math.ceil(mosaic.shape[dim] / chunks), dim)


_OPERATIONS: dict[Any, Callable[..., Any]] = {
    torch.stack: _stack,
    torch.cat: _cat,
    torch.split: _split,
    torch.chunk: _chunk,
}


def _aliases(model: PreTrainedModel) -> dict[str, str]:
    """Parameters that share their values with an earlier one -> the earlier one."""
    owners: dict[int, str] = {}
    aliases = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = owners.setdefault(id(parameter), name)
        if owner != name:
            aliases[name] = owner
    return aliases


# -- strictness ---------------------------------------------------------------------------------------------------


def _missing_and_unexpected(
    model: PreTrainedModel, names: list[str], found: Mapping[str, Any], unexpected: list[str]
) -> list[str]:
    """What does not fit by name, except where the model's class says that it may."""
    buffers = [name for name, _ in model.named_buffers()]
    harmless = set(model._keys_to_ignore_on_load_unexpected or ())
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        harmless.add(r"rotary_emb\.inv_freq")  # in every layer of files from before it was computed
    if any(name.endswith("position_ids") for name in buffers):
        harmless.add(r"(^|\.)position_ids$")
    dispensable = set(model._keys_to_ignore_on_load_missing or ())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    missing = [
        name
        for name in names
        if name not in found and (name in parameters or not any(re.search(known, name) for known in dispensable))
    ]
    extra = [key for key in unexpected if not any(re.search(known, key) for known in harmless)]
    return [
        f"{label}: {shorten(sorted(keys))}" for label, keys in (("missing", missing), ("unexpected", extra)) if keys
    ]


def _misshapen(
    shapes: Mapping[str, tuple[int, ...]], found: Mapping[str, list[Piece]], checkpoint: Checkpoint
) -> list[str]:
    """What does not fit by shape: tensors of the model, and those of the file of which too much or little is used."""
    wrong: dict[str, str] = {}
    for name, pieces in found.items():
        there = tuple(max(piece.target[dim][1] for piece in pieces) for dim in range(len(pieces[0].target)))
        if there != shapes[name]:
            said = f"shape of {name}: {list(there)} in the file, {list(shapes[name])} in the model"
            wrong.update((piece.key, said) for piece in pieces)
    for key, shape in file_shapes(found).items():
        if key not in wrong and shape != checkpoint.shape(key):
            wrong[key] = f"shape of {key}: {list(checkpoint.shape(key))} in the file, {list(shape)} in the model"
    return sorted(set(wrong.values()))


def _check_covered(found: Mapping[str, Sequence[Piece]], family: ModelFamily) -> None:
    """Every entry of every tensor of the files must belong to the model, or an export would have holes."""
    entries: dict[str, int] = {}
    for pieces in found.values():
        for piece in pieces:
            entries[piece.key] = entries.get(piece.key, 0) + volume(piece.source)
    for key, shape in file_shapes(found).items():
        if entries[key] != math.prod(shape):
            raise ModelError(
                f"the {family.model_type} family uses {entries[key]} of the {math.prod(shape)} entries of {key}; "
                "its `weights` must use each once"
            )


def file_shapes(found: Mapping[str, Sequence[Piece]]) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that a layout writes."""
    boxes: dict[str, list[Box]] = {}
    for pieces in found.values():
        for piece in pieces:
            boxes.setdefault(piece.key, []).append(piece.source)
    return {
        key: tuple(max(box[dim][1] for box in group) for dim in range(len(group[0]))) for key, group in boxes.items()
    }


def shorten(names: Sequence[str], limit: int = 5) -> str:
    """A list that stays readable when it is long."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
