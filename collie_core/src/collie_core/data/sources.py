"""Files, also by URL, and hub data sets as rows, each with its origin for the error sentence.

Values are handed on as written: nothing is coerced, guessed or filled in. JSON and text are read here, since
only that gives the file and line of what is broken; CSV, parquet and the hub go through `datasets`.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from collie_core import storage
from collie_core.errors import DataError

if TYPE_CHECKING:
    from collie_core.config.data import SourceConfig


class Row(NamedTuple):
    """One row and where it stands: "train.jsonl:3", "data.parquet row 3", "org/name row 3"."""

    origin: str
    values: Mapping[str, Any]


class Source:
    """One entry of `data.train` or `data.eval`.

    Raises:
        DataError: no such file, a folder, or a suffix that no reader knows.
        StorageError: a URL from which nothing can be fetched.
    """

    def __init__(self, config: SourceConfig) -> None:
        self.config = config
        self.name = config.path
        self.is_url = storage.is_url(config.path)
        if self.is_url:
            _reader(config.path)
            path = storage.fetch(config.path)
        else:
            path = Path(config.path).expanduser()
        self.path = path if _is_local(path, config.path) else None
        self._hub: Any = None  # the loaded data set, so that it is looked up once

    def identity(self) -> list[Any]:
        """What the rows depend on: a changed file has another identity."""
        if self.path is None:
            return ["hub", self.name, self._hub_rows()._fingerprint]
        if self.is_url:
            return ["url", self.name, storage.version_of(self.path), self.config.split]
        file = self.path.stat()
        return ["file", str(self.path.resolve()), file.st_size, file.st_mtime_ns, self.config.split]

    def rows(self) -> Iterator[Row]:
        """The rows of the split, in order.

        Raises:
            DataError: a row that cannot be read, with file, line and column; or no row at all.
        """
        if self.path is None:
            rows = _numbered(self._hub_rows(), self.name)
        else:
            read, path = _reader(self.name), self.path
            shown = self.name if self.is_url else str(path)
            rows = _sliced(lambda: read(path, shown), self.config.split, self.name)
        try:
            first = next(rows, None)
        except OSError as error:
            raise DataError(f"{self.name} cannot be read: {error.strerror}") from error
        if first is None:
            where = f" in {self.config.split}" if self.config.split else ""
            raise DataError(f"{self.name} holds no rows{where}")
        yield first
        yield from rows

    def _hub_rows(self) -> Any:
        if self._hub is None:
            self._hub = _load_hub(self.name, self.config.split or "train")
        return self._hub


def handed_rows(rows: Iterable[Any], name: str) -> Iterator[Row]:
    """Rows given by a program; any iterable of mappings, a `datasets.Dataset` too.

    Raises:
        DataError: a row is no mapping.
    """
    for number, values in enumerate(rows, 1):
        origin = f"{name} row {number}"
        yield Row(origin, _mapping(values, origin))


# -- where a path leads -------------------------------------------------------------------------------------


def _is_local(path: Path, written: str) -> bool:
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if file.suffix.lower() in READERS)
        known = ", ".join(files[:5]) if files else f"it has no {' '.join(READERS)}"
        raise DataError(f"{written} is a folder; name a file in it ({known})")
    if path.exists():
        _reader(written)
        return True
    if path.suffix.lower() in READERS or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", written):
        raise DataError(f"{written} does not exist{_nearest(path)}")
    return False


def _reader(written: str) -> Reader:
    suffix = PurePosixPath(written).suffix.lower()
    if suffix not in READERS:
        raise DataError(f"{written}: unknown kind of file {suffix!r}; known are {' '.join(READERS)}")
    return READERS[suffix]


def _nearest(path: Path) -> str:
    """The names most like a missing one, or how far the path exists."""
    if path.parent.is_dir():
        names = [item.name for item in path.parent.iterdir()]
        near = get_close_matches(path.name, names, n=3, cutoff=0.5)
        return f"; did you mean {' or '.join(str(path.parent / name) for name in near)}?" if near else ""
    above = next(parent for parent in path.absolute().parents if parent.is_dir())
    return f": its folder is missing too, only {above} is there"


def _load_hub(name: str, split: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, split=split)
    except Exception as error:  # (datasets, huggingface_hub and httpx raise types of their own)
        raise DataError(
            f"{name} is no file here, and the split {split} of a Hugging Face data set of that name "
            f"cannot be loaded: {_sentence(error)}"
        ) from error


# -- readers ------------------------------------------------------------------------------------------------

Reader = Callable[[Path, str], Iterator[Row]]
"""(file, its name in messages) -> its rows."""


def _read_jsonl(path: Path, name: str) -> Iterator[Row]:
    for number, line in _lines(path, name):
        if not line.isspace() and line:
            values = _parse(line, name, first_line=number)
            yield Row(f"{name}:{number}", _mapping(values, f"{name}:{number}"))


def _read_json(path: Path, name: str) -> Iterator[Row]:
    """A list of objects, `{"data": [...]}`, or objects line by line. The file is read whole."""
    text = _decode(path.read_bytes(), name, line=1)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON lines under the name of JSON
            yield from _read_jsonl(path, name)
            return
        content = _parse(text, name)
    except (ValueError, RecursionError):
        content = _parse(text, name)
    if isinstance(content, dict):
        content = content.get("data", [content])
    if not isinstance(content, list):
        raise DataError(f'{name} holds neither a list of objects nor {{"data": [...]}}')
    yield from handed_rows(content, name)


def _read_text(path: Path, name: str) -> Iterator[Row]:
    """One sample per line; blank lines are skipped."""
    for number, line in _lines(path, name):
        if line and not line.isspace():
            yield Row(f"{name}:{number}", {"text": line})


def _read_csv(path: Path, name: str) -> Iterator[Row]:
    """Every value as the text it is written with: "NA" and "007" stay what they are."""
    import csv

    from datasets import Features, Value

    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        header = next(csv.reader(file), [])
    columns = Features({column: Value("string") for column in header})
    return _numbered(_stream("csv", path, name, features=columns, keep_default_na=False), name)


def _read_parquet(path: Path, name: str) -> Iterator[Row]:
    return _numbered(_stream("parquet", path, name), name)


READERS: dict[str, Reader] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}


def _lines(path: Path, name: str) -> Iterator[tuple[int, str]]:
    """Line numbers and lines without their ends. Only \\n ends a line: U+2028 and the like do not."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            line = _decode(raw, name, line=number)
            yield number, (line.removeprefix("\ufeff") if number == 1 else line).rstrip("\r\n")


def _decode(raw: bytes, name: str, *, line: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode("utf-8")
        raise DataError(
            f"{_place(name, before, line)}: byte 0x{raw[error.start]:02x} is not UTF-8; save it as UTF-8"
        ) from error


def _parse(text: str, name: str, *, first_line: int = 1) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        place = _place(name, text[: error.pos], first_line)
        raise DataError(f"{place}: this is not JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # NaN, an integer of thousands of digits, endless nesting
        raise DataError(f"{name}:{first_line}: this is not JSON: {_sentence(error)}") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"JSON has no {name}")


def _place(name: str, before: str, first_line: int) -> str:
    """file:line:column of the character after `before`."""
    line = first_line + before.count("\n")
    return f"{name}:{line}:{len(before) - before.rfind(chr(10))}"


def _stream(kind: str, path: Path, name: str, **options: Any) -> Iterator[Any]:
    """The rows of a local file through `datasets`, which in streaming copies nothing."""
    import datasets

    try:
        yield from datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True, **options)
    except Exception as error:  # (pandas and pyarrow raise types of their own)
        raise DataError(f"{name} cannot be read as {kind}: {_sentence(error.__cause__ or error)}") from error


def _numbered(rows: Iterable[Any], name: str) -> Iterator[Row]:
    return (Row(f"{name} row {number}", values) for number, values in enumerate(rows, 1))


def _mapping(values: object, origin: str) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        kind = type(values).__name__
        raise DataError(f'{origin}: a row is an object such as {{"text": ...}}, not {kind}')
    return values


def _sentence(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# -- splits -------------------------------------------------------------------------------------------------


def _sliced(read: Callable[[], Iterator[Row]], split: str | None, name: str) -> Iterator[Row]:
    """The rows of `split`, in the slicing syntax of `datasets`; a local file is the split `train`."""
    if split is None or split == "train":
        return read()
    size = sum(1 for _ in read())
    pieces = _slices(split, size, name)
    return itertools.chain.from_iterable(itertools.islice(read(), start, stop) for start, stop in pieces)


def _slices(split: str, size: int, name: str) -> Sequence[tuple[int, int]]:
    from datasets import ReadInstruction

    try:
        pieces = ReadInstruction.from_spec(split).to_absolute({"train": size})
    except (ValueError, AssertionError) as error:
        raise DataError(
            f"{name} has {size} rows, all in the split train; cannot take split={split!r} of them "
            f"({_sentence(error)}). Write for instance train[:90%] or train[100:]"
        ) from error
    return [(piece.from_, piece.to) for piece in pieces]
