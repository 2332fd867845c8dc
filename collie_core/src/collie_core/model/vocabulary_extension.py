"""More rows for the matrices that have one for each token: new tokens start as means of old ones.

The files are read as if the new rows stood in them, so whoever loads a part of a matrix (a tensor-parallel rank, a
ZeRO-3 share, a merge) asks for its rows as always. Their values are a function of the files alone, in float64 and
rounded once to the type of the file: the same bits on every topology.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from collie_core.errors import ModelError
from collie_core.model.boxes import Box, Piece, replaced, shape_of, slices, whole
from collie_core.model.files import Checkpoint, Kind
from collie_core.model.layout import shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from collie_core.config.model import ResizeVocabulary

BLOCK = 1 << 20  # entries of which the mean is taken at a time


@dataclass(frozen=True)
class VocabularyExtension:
    """How a vocabulary grows."""

    old_size: int
    """Rows of the files."""

    size: int
    """Rows of the model."""

    known: int
    """The first rows of the files, up to that of the last token; any after them only fill the matrix up."""

    pieces: Mapping[int, tuple[int, ...]]
    """New token -> the old ones whose mean its row is; none: the mean of all `known`, as of a row without a token."""

    def is_new(self, row: int) -> bool:
        """Whether a row is not that of the files."""
        return row >= self.old_size or row in self.pieces

    def to_json(self) -> dict[str, Any]:
        """As JSON has it."""
        pieces = {str(token): list(ids) for token, ids in self.pieces.items()}
        return {"old_size": self.old_size, "size": self.size, "known": self.known, "pieces": pieces}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> VocabularyExtension:
        """The other way round."""
        pieces = {int(token): tuple(ids) for token, ids in found["pieces"].items()}
        return cls(found["old_size"], found["size"], found["known"], pieces)


def extend(
    tokenizer: PreTrainedTokenizerBase, section: ResizeVocabulary, rows: int
) -> tuple[PreTrainedTokenizerBase, VocabularyExtension]:
    """A copy of the tokenizer with the new tokens, and what that means for a model whose files have so many `rows`.

    Raises:
        ModelError: the tokenizer has one of the tokens, or cuts one into nothing; or the size is too small.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    cut = {token: tuple(tokenizer(token, add_special_tokens=False)["input_ids"]) for token in section.tokens}
    if known := [repr(token) for token, ids in cut.items() if token in vocabulary or _is_one(tokenizer, token, ids)]:
        raise ModelError(f"model.resize_vocabulary.tokens: the tokenizer has {shorten(known)} already; leave it out")
    if section.init == "pieces":
        _require_pieces(cut, [repr(token) for token, row in vocabulary.items() if row >= rows])
    extended = copy.deepcopy(tokenizer)
    extended.add_tokens(list(section.tokens))
    pieces = {
        cast(int, extended.convert_tokens_to_ids(token)): ids if section.init == "pieces" else ()
        for token, ids in cut.items()
    }
    count = 1 + max(vocabulary.values())
    needed = 1 + max(extended.get_vocab().values())
    assert len(pieces) == len(section.tokens)
    assert all(count <= row < needed for row in pieces)
    return extended, VocabularyExtension(rows, _size(section, rows, needed), min(count, rows), pieces)


def _is_one(tokenizer: PreTrainedTokenizerBase, text: str, ids: tuple[int, ...]) -> bool:
    """Whether a text has one token for itself, which may be written otherwise in the vocabulary."""
    return len(ids) == 1 and tokenizer.decode(list(ids)) == text


def _require_pieces(cut: Mapping[str, tuple[int, ...]], without_row: list[str]) -> None:
    """Refuse new tokens of which it is not known what they were before."""
    if without_row:
        raise ModelError(
            f"model.resize_vocabulary.init=pieces: the model has no rows for {shorten(without_row)} of the tokenizer, "
            "and their pieces are not known; set init to mean, or use the model's own tokenizer and name them in tokens"
        )
    if nothing := [repr(token) for token, ids in cut.items() if not ids]:
        raise ModelError(
            f"model.resize_vocabulary.init=pieces: the tokenizer cuts {shorten(nothing)} into nothing; set init to mean"
        )


def _size(section: ResizeVocabulary, rows: int, needed: int) -> int:
    size = section.size or max(rows, needed)
    limits = (needed, f"what the tokenizer needs, {needed}"), (rows, f"the {rows} rows of the model's files")
    for least, what in limits:
        if size < least:
            raise ModelError(f"model.resize_vocabulary.size={size} is below {what}; leave it out, or set at least that")
    return -(-size // section.multiple_of) * section.multiple_of


class ExtendedCheckpoint(Checkpoint):
    """The files with more rows in the tensors `keys`."""

    def __init__(self, files: Checkpoint, extension: VocabularyExtension, keys: Collection[str]) -> None:
        super().__init__(files.name, ())
        self._files = files
        self._extension = extension
        self._means: dict[str, Tensor] = {}
        self._slices = files._slices
        self._kinds = dict(files._kinds)
        for key in keys:
            shape, dtype = self._kinds[key]
            self._kinds[key] = Kind((extension.size, *shape[1:]), dtype)
        self._keys = frozenset(keys)

    def read(self, key: str, box: Box) -> Tensor:
        """See `Checkpoint`; what holds a new row is no view."""
        new = [row for row in range(*box[0]) if self._extension.is_new(row)] if key in self._keys else []
        if not new:
            return self._files.read(key, box)
        begin, end = box[0]
        values = torch.empty(shape_of(box), dtype=self.dtype(key))
        if begin < (last := min(end, self._extension.old_size)):
            values[: last - begin] = self._files.read(key, replaced(box, 0, (begin, last)))
        for row in new:
            values[row - begin] = self._new_row(key, row)[slices(box[1:])]
        return values

    def _new_row(self, key: str, row: int) -> Tensor:
        """In float64, or of a bias a number."""
        pieces = self._extension.pieces.get(row, ())
        if not pieces:
            if key not in self._means:
                self._means[key] = self._mean_of_known(key)
            return self._means[key]
        box = whole(self._files.shape(key))
        rows = [self._files.read(key, replaced(box, 0, (piece, piece + 1))) for piece in pieces]
        return torch.cat(rows).double().mean(0)

    def _mean_of_known(self, key: str) -> Tensor:
        """A block of rows at a time, so that no second matrix is ever in memory."""
        box, known = whole(self._files.shape(key)), self._extension.known
        step = max(1, BLOCK // math.prod(shape_of(box[1:])))
        total = torch.zeros(shape_of(box[1:]), dtype=torch.float64)
        for begin in range(0, known, step):
            rows = self._files.read(key, replaced(box, 0, (begin, min(begin + step, known))))
            total += rows.double().sum(0)
        return total / known


def grown(
    before: Mapping[str, tuple[int, ...]],
    after: Mapping[str, tuple[int, ...]],
    layout: Mapping[str, list[Piece]],
    extension: VocabularyExtension,
) -> set[str]:
    """The tensors of the files that have a row for each token: those whose shape follows the size of the vocabulary.

    Args:
        before: shapes of a model with the old size, by name.
        after: with the new one.
        layout: of the first.
        extension: from which size to which.

    Raises:
        ModelError: a tensor grows, and not by rows alone.
    """
    keys = set()
    for name, pieces in layout.items():
        old, new = before[name], after[name]
        if old == new:
            continue
        rows_alone = (extension.old_size, *old[1:]) == old and (extension.size, *old[1:]) == new
        if not rows_alone or len(pieces) > 1 or pieces[0].source != whole(old):
            raise ModelError(
                f"model.resize_vocabulary: {name} has the shape {list(old)} and with the new size {list(new)}: it does "
                "not have one row for each token in the files, so it cannot be extended"
            )
        keys.add(pieces[0].key)
    return keys
