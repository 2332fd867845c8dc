"""Safetensors on disk, a box of a tensor at a time: read from a folder or hub id, written to one."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from collie_core import storage
from collie_core.errors import ModelError
from collie_core.model.boxes import Box, shape_of, slices

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# https://github.com/huggingface/safetensors#format
DTYPES: dict[str, torch.dtype] = {
    code: getattr(torch, name)
    for code, name in {
        "F64": "float64",
        "F32": "float32",
        "F16": "float16",
        "BF16": "bfloat16",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E4M3FNUZ": "float8_e4m3fnuz",
        "F8_E5M2": "float8_e5m2",
        "F8_E5M2FNUZ": "float8_e5m2fnuz",
        "F8_E8M0": "float8_e8m0fnu",
        "I64": "int64",
        "I32": "int32",
        "I16": "int16",
        "I8": "int8",
        "U64": "uint64",
        "U32": "uint32",
        "U16": "uint16",
        "U8": "uint8",
        "BOOL": "bool",
        "C64": "complex64",
    }.items()
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
CHUNK = 1 << 20  # entries that are converted and written at a time


class Kind(NamedTuple):
    """What a header says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


class Checkpoint:
    """The tensors of a folder or hub id. Only headers are read until a box is asked for."""

    def __init__(self, name: str, files: Iterable[Path]) -> None:
        self.name = name
        self._slices: dict[str, Any] = {}
        self._kinds: dict[str, Kind] = {}
        with _reading(name):
            for file in files:
                self._open(file)

    @classmethod
    def open(cls, name: str | Path) -> Checkpoint:
        """The safetensors of a folder, URL or hub id, in one file or several with an index.

        Raises:
            ModelError: there are none, a file is missing or torn, or the index names one outside its folder.
        """
        folder = storage.local_folder(str(name))
        single = _find(folder, WEIGHTS)
        if single is not None:
            return cls(str(name), [single])
        index = _find(folder, INDEX)
        if index is None:
            raise ModelError(
                f"{name} has neither {WEIGHTS} nor {INDEX}; weights are read from safetensors files alone, never from "
                "pickled ones (pytorch_model.bin), so save the model again with a current transformers"
            )
        files = []
        for entry in _indexed_files(index):
            found = _find(folder, entry)
            if found is None:
                raise ModelError(f"{index} names {entry}, which is not there")
            files.append(found)
        return cls(str(name), files)

    def keys(self) -> list[str]:
        """The names of its tensors."""
        return list(self._kinds)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._kinds[key].shape

    def dtype(self, key: str) -> torch.dtype:
        """The precision of a tensor."""
        return self._kinds[key].dtype

    def read(self, key: str, box: Box) -> Tensor:
        """A part of a tensor. It is a view of the mapped file: copy what is to stay.

        Raises:
            ModelError: the file cannot be read.
        """
        with _reading(self.name):
            part: Tensor = self._slices[key][slices(box) if box else ...]
        return part

    def fingerprint(self) -> str:
        """A digest of names, types, shapes and of some values of every tensor: other weights have another."""
        digest = hashlib.blake2b(digest_size=16)
        for key in sorted(self._kinds):
            kind = self._kinds[key]
            digest.update(f"{key} {kind.dtype} {kind.shape}".encode())
            rows = tuple((0, min(size, 32)) for size in kind.shape)
            digest.update(self.read(key, rows).contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _open(self, file: Path) -> None:
        from safetensors import safe_open

        handle: Any = safe_open(file, framework="pt")
        for key in handle.keys():  # noqa: SIM118  (no mapping)
            part = self._slices[key] = handle.get_slice(key)
            code = part.get_dtype()
            if code not in DTYPES:
                raise ModelError(f"{file}: {key} is of type {code}, which is not supported")
            self._kinds[key] = Kind(tuple(part.get_shape()), DTYPES[code])


class NewFile(Protocol):
    """A file that is being written, in any order."""

    def write(self, offset: int, values: Tensor, dtype: torch.dtype) -> int:
        """Put values, converted to `dtype`, at a place in bytes; gives how many bytes they are."""

    def close(self) -> None:
        """All has come."""


OpenFile = Callable[[Path, int], NewFile]
"""(path, size in bytes) -> where the bytes of that file go."""


class DiskFile:
    """Straight to the disk."""

    def __init__(self, path: Path, size: int) -> None:
        self._file = path.open("wb")

    def write(self, offset: int, values: Tensor, dtype: torch.dtype) -> int:
        """See `NewFile`."""
        self._file.seek(offset)
        written = 0
        for part in values.reshape(-1).split(CHUNK):
            data = part.detach().to("cpu", dtype).contiguous().view(torch.uint8)
            written += self._file.write(memoryview(data.numpy()))
        return written

    def close(self) -> None:
        """See `NewFile`."""
        self._file.close()


class TensorFile:
    """A new safetensors file, filled box by box in any order: its header is known before its values."""

    def __init__(self, path: Path, kinds: Mapping[str, Kind], open_file: OpenFile = DiskFile) -> None:
        # Widest types first, as safetensors itself does, so that every tensor is aligned to its entries.
        keys = sorted(kinds, key=lambda key: (-kinds[key].dtype.itemsize, key))
        ends = list(itertools.accumulate(kinds[key].nbytes for key in keys))
        begins = dict(zip(keys, [0, *ends], strict=False))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for key in keys:
            header[key] = {
                "dtype": CODES[kinds[key].dtype],
                "shape": list(kinds[key].shape),
                "data_offsets": [begins[key], begins[key] + kinds[key].nbytes],
            }
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._kinds = kinds
        self._begins = {key: 8 + len(text) + begin for key, begin in begins.items()}
        self._left = sum(kind.nbytes for kind in kinds.values())
        self._file = open_file(path, 8 + len(text) + self._left)
        head = torch.frombuffer(bytearray(len(text).to_bytes(8, "little") + text), dtype=torch.uint8)
        self._file.write(0, head, torch.uint8)

    def write(self, key: str, box: Box, values: Tensor) -> None:
        """Fill a box of a tensor with values of its shape, converted to the type of the file."""
        kind = self._kinds[key]
        for start, run in _runs(kind.shape, box, values):
            self._left -= self._file.write(self._begins[key] + start * kind.dtype.itemsize, run, kind.dtype)

    def close(self, *, complete: bool = True) -> None:
        """Finish the file; `complete`: every entry must have been written."""
        self._file.close()
        assert self._left == 0 or not complete, f"{self._left} bytes were not written"


class TensorFolder:
    """The weights of a model in files of limited size, with an index when there are several."""

    def __init__(
        self, folder: Path, kinds: Mapping[str, Kind], max_file_bytes: float, open_file: OpenFile = DiskFile
    ) -> None:
        groups = _groups(kinds, max_file_bytes)
        names = [WEIGHTS] if len(groups) == 1 else [_numbered(at, len(groups)) for at in range(1, len(groups) + 1)]
        self._folder, self._kinds, self._names = folder, kinds, names
        self._files: list[TensorFile] = []
        self._file_of: dict[str, TensorFile] = {}
        self._name_of: dict[str, str] = {}
        for name, keys in zip(names, groups, strict=True):
            self._files.append(TensorFile(folder / name, {key: kinds[key] for key in keys}, open_file))
            self._file_of.update(dict.fromkeys(keys, self._files[-1]))
            self._name_of.update(dict.fromkeys(keys, name))

    def write(self, key: str, box: Box, values: Tensor) -> None:
        """See `TensorFile.write`."""
        self._file_of[key].write(key, box, values)

    def close(self, *, complete: bool = True) -> None:
        """Finish the files and write the index; `complete`: every entry must have been written."""
        for file in self._files:
            file.close(complete=complete)
        if len(self._files) > 1:
            metadata = {
                "total_parameters": sum(math.prod(kind.shape) for kind in self._kinds.values()),
                "total_size": sum(kind.nbytes for kind in self._kinds.values()),
            }
            index = {"metadata": metadata, "weight_map": self._name_of}
            (self._folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


# -- finding files ------------------------------------------------------------------------------------------------


def _find(name: str, file: str) -> Path | None:
    """A file of a folder, or of a hub id (from the cache, or downloaded); None when it has none of that name."""
    if Path(name).is_dir():
        path = Path(name) / file
        return path if path.is_file() else None
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load the weights of {name}: {' '.join(str(error).split())}") from error
    return Path(found) if found else None


def _indexed_files(index: Path) -> list[str]:
    """The files that an index names; they may only lie beside it, so that an index opens nothing else."""
    try:
        entries = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index} is not an index of weights: {error}") from error
    for name in entries:
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelError(f"{index} points outside its folder: {name!r}")
    return entries


@contextmanager
def _reading(name: str) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot load the weights of {name}: {' '.join(str(error).split())}") from error


# -- laying out files ---------------------------------------------------------------------------------------------


def _groups(kinds: Mapping[str, Kind], max_bytes: float) -> list[list[str]]:
    """The tensors of each file, in order; one that is larger than a file gets its own."""
    groups: list[list[str]] = [[]]
    size = 0
    for key, kind in kinds.items():
        if groups[-1] and size + kind.nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(key)
        size += kind.nbytes
    return groups


def _numbered(at: int, count: int) -> str:
    return f"model-{at:05d}-of-{count:05d}.safetensors"


def _runs(shape: Sequence[int], box: Box, values: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The parts of `values` that lie one after another in a tensor of `shape`: (first entry, part)."""
    assert values.shape == shape_of(box), f"{tuple(values.shape)} does not fill {box}"
    cut = len(shape)  # the dimensions from here on are whole
    while cut and box[cut - 1] == (0, shape[cut - 1]):
        cut -= 1
    outer = box[: max(0, cut - 1)]
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    inner = sum(begin * stride for (begin, _), stride in zip(box[len(outer) :], strides[len(outer) :], strict=True))
    for index in itertools.product(*(range(begin, end) for begin, end in outer)):
        within = tuple(at - begin for at, (begin, _) in zip(index, outer, strict=True))
        yield inner + sum(at * stride for at, stride in zip(index, strides, strict=False)), values[within]
