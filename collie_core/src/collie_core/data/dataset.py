"""The tokenised data set: built once per machine, memory-mapped by every process, with its statistics."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from collie_core import __version__
from collie_core.config.data import SourceConfig
from collie_core.data.formats import Counts, Encoder, Sample, detect
from collie_core.data.loader import IGNORED
from collie_core.data.sources import Row, Source, handed_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from collie_core.config.data import DataConfig

LAYOUT = 1  # of the cached files; a change makes old ones unread
BATCH = 512  # rows tokenised together
ARRAYS = {"input_ids": np.int32, "labels": np.int32, "ends": np.int64}


@dataclass(frozen=True)
class DataStats:
    """What a data set holds, and what was done to make it fit."""

    samples: int
    tokens: int
    target_tokens: int
    longest: int
    truncated: int = 0
    split: int = 0
    dropped_long: int = 0
    dropped_without_target: int = 0

    def lines(self) -> list[str]:
        """Sentences for a person."""
        share = self.target_tokens / self.tokens
        lines = [f"{share:.0%} of {self.tokens:,} tokens are targets; the longest sample has {self.longest}"]
        for count, what in (
            (self.truncated, "samples were longer than data.max_length: their ends were cut off"),
            (self.split, "samples were longer than data.max_length and became several"),
            (self.dropped_long, "samples were longer than data.max_length and were dropped"),
            (self.dropped_without_target, "samples had no target token and were dropped"),
        ):
            if count:
                lines.append(f"{count:,} {what}")
        return lines


@dataclass(frozen=True)
class Arrays:
    """All samples end to end: ids and labels [tokens], and where each sample ends [samples]."""

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    ends: NDArray[np.int64]


@dataclass(frozen=True)
class SourceRange:
    """The samples `start` to `stop` come from one source; `per_epoch` of them are seen in each epoch."""

    start: int
    stop: int
    per_epoch: int


class TokenizedDataset(Sequence[dict[str, Any]]):
    """Samples by index: `input_ids` and `labels`, int32 arrays of equal length."""

    def __init__(self, arrays: Arrays, stats: DataStats, ranges: Sequence[SourceRange]) -> None:
        self.arrays = arrays
        self.stats = stats
        self.ranges = tuple(ranges)
        self.lengths = np.diff(arrays.ends, prepend=0)  # tokens of each sample

    def __len__(self) -> int:
        return len(self.arrays.ends)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        begin, end = int(self.arrays.ends[at - 1]) if at else 0, int(self.arrays.ends[at])
        return {"input_ids": self.arrays.input_ids[begin:end], "labels": self.arrays.labels[begin:end]}

    @property
    def samples_per_epoch(self) -> int:
        """Samples of one pass, as the weights have it."""
        return sum(source.per_epoch for source in self.ranges)


def prepare_dataset(
    given: Sequence[SourceConfig] | Sequence[Any],
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    vocab_size: int,
    name: str,
) -> TokenizedDataset:
    """The samples of sources (cached on disk) or of rows that a program hands in (in memory).

    Raises:
        DataError: a file or row cannot be used, or the share of targets contradicts `data.train_on`.
    """
    encoder = Encoder(tokenizer, data, vocab_size)
    if len(given) and isinstance(given[0], SourceConfig):
        return _from_sources(given, encoder, name)
    samples = list(_encode(handed_rows(given, name), None, encoder))
    encoder.check_share(name)
    return TokenizedDataset(_in_memory(samples), _stats(encoder.counts), [SourceRange(0, len(samples), len(samples))])


# -- the cache ----------------------------------------------------------------------------------------------


def _from_sources(sources: Sequence[SourceConfig], encoder: Encoder, name: str) -> TokenizedDataset:
    from filelock import FileLock

    root = Path(encoder.data.cache_dir) if encoder.data.cache_dir else default_cache_dir()
    root.mkdir(parents=True, exist_ok=True)
    folder = root / _fingerprint(sources, encoder)
    with FileLock(folder.with_suffix(".lock")):  # one process of a machine builds, the others wait and find it
        meta = _read_meta(folder)
        if meta is None:
            meta = _build(folder, sources, encoder, name)
    arrays = Arrays(**{key: np.memmap(folder / key, dtype=kind, mode="r") for key, kind in ARRAYS.items()})
    return TokenizedDataset(arrays, DataStats(**meta["stats"]), _ranges(sources, meta["sizes"]))


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/collie/datasets`, by default below ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "collie" / "datasets"


def _fingerprint(sources: Sequence[SourceConfig], encoder: Encoder) -> str:
    """Equal for equal files, options and tokenizer, and for nothing else."""
    data, tokenizer = encoder.data, encoder.tokenizer
    facts = {
        "collie": [__version__, LAYOUT],
        "sources": [[source.format, *Source(source).identity()] for source in sources],
        "options": [data.max_length, data.train_on, data.long_samples, encoder.template, encoder.vocab_size],
        "tokenizer": [tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _read_meta(folder: Path) -> dict[str, Any] | None:
    """What a whole cache says of itself; None when there is none or a file is not as it was written."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        whole = all((folder / key).stat().st_size == meta["bytes"][key] for key in ARRAYS)
    except (OSError, ValueError, KeyError):
        return None
    return meta if whole else None


def _build(folder: Path, sources: Sequence[SourceConfig], encoder: Encoder, name: str) -> dict[str, Any]:
    """Tokenise everything into a folder beside, then rename it: a cache is whole or not there."""
    beside = folder.with_suffix(".new")
    for leftover in (beside, folder):
        shutil.rmtree(leftover, ignore_errors=True)
    beside.mkdir()
    sizes, end = [], 0
    with ExitStack() as stack:
        files = {key: stack.enter_context((beside / key).open("wb")) for key in ARRAYS}
        for source in sources:
            before = encoder.counts.samples
            for sample in _encode(Source(source).rows(), source.format, encoder):
                end += len(sample.input_ids)
                for key, values in (("input_ids", sample.input_ids), ("labels", sample.labels), ("ends", [end])):
                    files[key].write(np.asarray(values, ARRAYS[key]).tobytes())
            sizes.append(encoder.counts.samples - before)
    encoder.check_share(name)
    stats = asdict(_stats(encoder.counts))
    meta = {"stats": stats, "sizes": sizes, "bytes": {key: (beside / key).stat().st_size for key in ARRAYS}}
    (beside / "meta.json").write_text(json.dumps(meta))
    beside.rename(folder)
    return meta


def _encode(rows: Iterable[Row], format: str | None, encoder: Encoder) -> Iterator[Sample]:
    """The samples of one source, tokenised a batch at a time."""
    pending = iter(rows)
    while batch := list(islice(pending, BATCH)):
        if format in (None, "auto"):
            format = detect(batch[0])
        yield from encoder.encode(batch, format)  # type: ignore[arg-type]


def _in_memory(samples: Sequence[Sample]) -> Arrays:
    ends = np.cumsum([len(sample.input_ids) for sample in samples], dtype=np.int64)
    ids = [np.asarray(sample.input_ids, np.int32) for sample in samples]
    labels = [np.asarray(sample.labels, np.int32) for sample in samples]
    nothing = [np.empty(0, np.int32)]
    return Arrays(np.concatenate(ids or nothing), np.concatenate(labels or nothing), ends)


def _stats(counts: Counts) -> DataStats:
    return DataStats(**{key: value for key, value in vars(counts).items() if key != "formats"})


def _ranges(sources: Sequence[SourceConfig], sizes: Sequence[int]) -> list[SourceRange]:
    stops = np.cumsum(sizes).tolist()
    return [
        SourceRange(stop - size, stop, round(size * source.weight))
        for source, size, stop in zip(sources, sizes, stops, strict=True)
    ]


# -- for a person -------------------------------------------------------------------------------------------


def segments(sample: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """The sample as text, cut where targets begin and end: (text, whether it is learned)."""
    ids, targets = [int(token) for token in sample["input_ids"]], [label != IGNORED for label in sample["labels"]]
    if targets and len(targets) > 1:
        targets[0] = targets[1]  # the first token is never a target; alone in front it would only distract
    cuts = [0, *(at for at in range(1, len(ids)) if targets[at] != targets[at - 1]), len(ids)]
    return [
        (str(tokenizer.decode(ids[begin:end])), bool(targets[begin]))
        for begin, end in zip(cuts, cuts[1:], strict=False)
    ]
