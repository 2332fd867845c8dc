"""The tokenised data set: built once per machine, memory-mapped by every process, with its statistics."""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, reduce
from itertools import accumulate, islice
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from collie_core.config.data import SourceConfig
from collie_core.data.formats import DataStats, Encoder, Format, Sample, detect_format
from collie_core.data.loader import IGNORE
from collie_core.data.sources import Row, Source, handed_rows
from collie_core.errors import DataError
from collie_core.storage import user_cache

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from collie_core.config.data import DataConfig

ROWS_PER_BATCH = 512  # tokenised together
BYTES_PER_READ = 1 << 20
CODE = ("formats.py", "sources.py", "tokenizer.py", "dataset.py")  # what the tokens of a row depend on
SAMPLES, FACTS = "samples.arrow", "facts.json"


class SourceRange(NamedTuple):
    """The samples `start` to `stop` came from one source of this weight."""

    start: int
    stop: int
    weight: float

    @property
    def per_epoch(self) -> int:
        """How many samples of the source an epoch shows, at least one."""
        return max(1, round(self.weight * (self.stop - self.start)))


@dataclass(frozen=True)
class Part:
    """The samples of one source: a `datasets.Dataset` of `input_ids`, `labels` and `length`, all int32."""

    rows: Any
    stats: DataStats
    learns_all: bool  # every token should be a target
    weight: float = 1.0


class TokenizedDataset(Sequence[Any]):
    """Samples by index: `input_ids` and `labels`, int32 arrays of equal length."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.stats = reduce(add, (part.stats for part in parts))
        self._rows = [part.rows.with_format("numpy", columns=["input_ids", "labels"], dtype=np.int32) for part in parts]
        self._lengths = [part.rows.data.column("length") for part in parts]
        stops = [*accumulate(len(rows) for rows in self._rows)]
        self._starts = [0, *stops[:-1]]
        self.ranges = tuple(map(SourceRange, self._starts, stops, (part.weight for part in parts)))

    def __len__(self) -> int:
        return self.ranges[-1].stop

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        source = bisect_right(self._starts, place) - 1
        return self._rows[source][place - self._starts[source]]

    @property
    def samples_per_epoch(self) -> int:
        """Samples of one pass, as the weights of the sources have it."""
        return sum(source.per_epoch for source in self.ranges)

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """The tokens of each sample."""
        return np.concatenate([column.to_numpy() for column in self._lengths])


def prepare_dataset(
    given: Sequence[SourceConfig] | Sequence[Mapping[str, Any]],
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    vocab_size: int,
    name: str,
) -> TokenizedDataset:
    """The samples of sources, cached on disk, or of rows that a program hands in, in memory.

    Any number of processes may call this at once: one of them tokenises a source, the others wait for it.

    Raises:
        DataError: a file or row cannot be used, or the share of targets is not what `data.train_on` says.
    """
    if len(given) == 0:
        raise DataError(f"data.{name} holds no samples")
    encoder = Encoder(tokenizer, data, vocab_size)
    if isinstance(given[0], SourceConfig):
        root = cache_root(data.cache_dir)
        parts = [_cached(Source(source), encoder, root) for source in given]  # type: ignore[arg-type]
    else:
        parts = [_in_memory(handed_rows(given, f"data.{name}"), encoder, name)]
    _check_targets(parts, data.train_on, name)
    return TokenizedDataset(parts)


def _check_targets(parts: Sequence[Part], train_on: str, name: str) -> None:
    """Where only answers should be learned, something else must be there too. (No target: see `_encoded`.)"""
    answers = [part.stats for part in parts if not part.learns_all]
    if answers and (total := reduce(add, answers)).prompted == 0:
        raise DataError(
            f"data.{name}: 100 % of the {total.tokens:,} tokens are targets, but only answers should be with "
            f"data.train_on={train_on}; give the samples prompts, or set data.train_on=all"
        )


# -- samples ------------------------------------------------------------------------------------------------


def _encoded(
    rows: Iterator[Row], format: Format, encoder: Encoder, stats: DataStats, name: str
) -> Iterator[list[Sample]]:
    """The samples of a source, batch by batch."""
    while batch := list(islice(rows, ROWS_PER_BATCH)):
        yield list(encoder.encode(batch, format, stats))
    if stats.samples == 0:
        raise DataError(
            f"{name}: no sample is left, 0 % of the tokens are targets ({stats.dropped_no_target} samples "
            f"had none, {stats.dropped_long} were too long); check data.train_on={encoder.data.train_on} and "
            f"data.max_length={encoder.data.max_length}"
        )


def _first_format(rows: Iterator[Row], written: str) -> tuple[Format, Iterator[Row]]:
    """The format of a source, by its first row unless it is written, and all the rows."""
    first = next(rows)

    def again() -> Iterator[Row]:
        yield first
        yield from rows

    return detect_format(first) if written == "auto" else written, again()  # type: ignore[return-value]


def _columns(samples: Iterable[Sample]) -> dict[str, list[Any]]:
    samples = list(samples)
    return {
        "input_ids": [np.array(sample.input_ids, np.int32) for sample in samples],
        "labels": [np.array(sample.labels, np.int32) for sample in samples],
        "length": [len(sample.input_ids) for sample in samples],
    }


def _features() -> Any:
    from datasets import Features, List, Value

    return Features({"input_ids": List(Value("int32")), "labels": List(Value("int32")), "length": Value("int32")})


def _in_memory(rows: Iterator[Row], encoder: Encoder, name: str) -> Part:
    from datasets import Dataset, concatenate_datasets

    stats = DataStats()
    format, rows = _first_format(rows, "auto")
    batches = [
        Dataset.from_dict(_columns(samples), features=_features())
        for samples in _encoded(rows, format, encoder, stats, f"data.{name}")
    ]
    return Part(concatenate_datasets(batches), stats, encoder.learns_all(format))


# -- the cache ----------------------------------------------------------------------------------------------


def cache_root(setting: str | None) -> Path:
    """The folder of tokenised data: `data.cache_dir`, or `collie/datasets` in the user's cache."""
    if setting is not None:
        return Path(setting).expanduser()
    return user_cache("datasets")


def _cached(source: Source, encoder: Encoder, root: Path) -> Part:
    """The samples of a source, tokenised now unless a whole cache of the same is there."""
    from filelock import FileLock

    folder = root / _fingerprint(source, encoder)
    if (part := _open(folder, source)) is not None:
        return part
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            return _open(folder, source) or _build(folder, source, encoder)
    except OSError as error:
        raise DataError(
            f"cannot keep the tokenised {source.name} in {root}: {error.strerror}; "
            "set data.cache_dir to a folder with room"
        ) from error


def _fingerprint(source: Source, encoder: Encoder) -> str:
    """A name that is the same for the same rows, options, tokenizer and code, and for nothing else."""
    import tokenizers
    import transformers

    tokenizer, data = encoder.tokenizer, encoder.data
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
    for passing in ("truncation", "padding"):  # the state of its last call
        vocabulary.pop(passing, None)
    facts = [
        source.identity(),
        [source.config.format, data.train_on, data.max_length, data.long_samples, encoder.vocab_size],
        [encoder.template, vocabulary, tokenizer.special_tokens_map],
        [transformers.__version__, tokenizers.__version__],
        [(Path(__file__).parent / name).read_text("utf-8") for name in CODE],
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _open(folder: Path, source: Source) -> Part | None:
    """The cached samples, or None when they are not there or not as they were written."""
    from datasets import Dataset

    try:
        facts = json.loads((folder / FACTS).read_text("utf-8"))
        if _checksum(folder / SAMPLES) != facts["checksum"]:
            return None
        stats = DataStats(**facts["stats"])
        rows = Dataset.from_file(str(folder / SAMPLES))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Part(rows, stats, facts["learns_all"], source.config.weight)


def _build(folder: Path, source: Source, encoder: Encoder) -> Part:
    """Tokenise into a folder beside, then rename it: whole or not there. The caller holds the lock."""
    from datasets.arrow_writer import ArrowWriter

    beside = folder.with_name(folder.name + ".new")
    for leftover in (beside, folder):  # of a process that was killed; damaged
        shutil.rmtree(leftover, ignore_errors=True)
    beside.mkdir()
    stats = DataStats()
    format, rows = _first_format(source.rows(), source.config.format)
    try:
        with ArrowWriter(path=str(beside / SAMPLES), features=_features()) as writer:
            for samples in _encoded(rows, format, encoder, stats, source.name):
                writer.write_batch(_columns(samples))
            writer.finalize()
        facts = {
            "source": source.name,
            "stats": asdict(stats),
            "learns_all": encoder.learns_all(format),
            "checksum": _checksum(beside / SAMPLES),
        }
        (beside / FACTS).write_text(json.dumps(facts), encoding="utf-8")
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    part = _open(folder, source)
    assert part is not None
    return part


def _checksum(path: Path) -> int:
    """CRC-32: it sees every damage that is not done on purpose, at a gigabyte per second and more."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(BYTES_PER_READ):
            checksum = zlib.crc32(block, checksum)
    return checksum


# -- for a person -------------------------------------------------------------------------------------------


def segments(sample: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """The sample as text, cut where targets begin and end: (text, whether it is learned)."""
    ids = [int(token) for token in sample["input_ids"]]
    targets = [int(label) != IGNORE for label in sample["labels"]]
    targets[:1] = targets[1:2]  # the first token never is; alone in front it would only distract
    cuts = [place for place in range(1, len(ids)) if targets[place] != targets[place - 1]]
    # Decoded from the beginning each time: decoders treat the first token of a text otherwise.
    texts = ["", *(str(tokenizer.decode(ids[:cut])) for cut in (*cuts, len(ids)))]
    return [
        (text[len(before) :], targets[begin]) for before, text, begin in zip(texts, texts[1:], (0, *cuts), strict=False)
    ]
