"""From tokenised samples to one `StepBatch` per optimizer step: order, packing, collation.

Nothing here has a state: the samples of a step follow from (seed, position), and every rank finds them alone.
Shapes: B rows of a micro-batch, L tokens of its longest row.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from collie_core.errors import DataError, ModelError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from collie_core.data.dataset import SourceRange, TokenizedDataset

Layout = tuple[tuple[tuple[int, int], ...], ...]
"""For each row its samples, in order: (position in the run, tokens). A position names a sample on every topology."""

IGNORE = -100  # a label that is no target; the default of torch's cross_entropy


@dataclass
class Batch:
    """A micro-batch: what one forward of one rank sees. Padded on the right, without an attention mask."""

    input_ids: Tensor  # [B, L] int64
    labels: Tensor  # [B, L] int64, the target AT each position; -100: none
    position_ids: Tensor | None = None  # [B, L] int64, from 0 in each packed sample; None: one sample per row
    layout: Layout = ()  # which samples lie in each row
    targets: Tensor | None = None  # [N] int64, places in [B x L] before which there is a target; None: look at all

    def find_targets(self) -> None:
        """Note where the targets are, as the labels are now."""
        places = torch.zeros_like(self.labels, dtype=torch.bool)
        places[:, :-1] = self.labels[:, 1:] != IGNORE
        self.targets = places.flatten().nonzero().squeeze(-1)

    def inputs(self) -> dict[str, Tensor]:
        """The arguments of the model's forward."""
        inputs = {"input_ids": self.input_ids}
        if self.position_ids is not None:
            inputs["position_ids"] = self.position_ids
        return inputs

    @property
    def target_tokens(self) -> int:
        """The number of positions with a target."""
        return int((self.labels != IGNORE).sum())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""
        positions = self.position_ids
        return Batch(
            self.input_ids.to(device, non_blocking=non_blocking),
            self.labels.to(device, non_blocking=non_blocking),
            None if positions is None else positions.to(device, non_blocking=non_blocking),
            self.layout,
            None if self.targets is None else self.targets.to(device, non_blocking=non_blocking),
        )


@dataclass
class StepBatch:
    """One rank's share of a global batch. Every rank gets the same number of micro-batches."""

    micro_batches: list[Batch]
    samples: int  # of the global batch, over all ranks: what the position in the data advances by
    tokens: int  # of this rank, without padding
    epoch: float  # the position after this step, in epochs

    def on(self, device: torch.device) -> list[Batch]:
        """The micro-batches on a device."""
        return [batch.to(device, non_blocking=True) for batch in self.micro_batches]

    @property
    def target_tokens(self) -> int:
        """Of this rank, as its labels are now."""
        return sum(batch.target_tokens for batch in self.micro_batches)


class EpochOrder:
    """Which sample stands at which position: a pure function of (seed, epoch). Epochs join without a gap."""

    def __init__(self, ranges: Sequence[SourceRange], *, seed: int, shuffle: bool = True) -> None:
        self.ranges = tuple(ranges)
        self.seed = seed
        self.shuffle = shuffle
        self.samples_per_epoch = sum(source.per_epoch for source in self.ranges)
        self._orders: dict[int, NDArray[np.int64]] = {}

    def indices(self, start: int, stop: int) -> NDArray[np.int64]:
        """The samples at positions `start` to `stop`, possibly of several epochs."""
        size = self.samples_per_epoch
        pieces = []
        for epoch in range(start // size, -(-stop // size)):
            offset = epoch * size
            pieces.append(self._epoch(epoch)[max(start - offset, 0) : stop - offset])
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._orders:
            self._orders = {key: order for key, order in self._orders.items() if key == epoch - 1}
            self._orders[epoch] = self._draw(epoch)
        return self._orders[epoch]

    def _draw(self, epoch: int) -> NDArray[np.int64]:
        bits = _random_bits(self.seed, epoch)
        order = np.concatenate([self._visits(source, bits) for source in self.ranges])
        return order[_permutation(bits, len(order))] if self.shuffle else order

    def _visits(self, source: SourceRange, bits: np.random.Philox) -> NDArray[np.int64]:
        """A source's samples in one epoch: all as often as its weight is whole, and a random rest."""
        size = source.stop - source.start
        copies, rest = divmod(source.per_epoch, size)
        whole = np.tile(np.arange(size), copies)
        if rest == 0:  # no bits are drawn, so that whole weights leave the order to `sample_order`
            return whole + source.start
        chosen = np.sort(_permutation(bits, size)[:rest])
        return np.concatenate([whole, chosen]) + source.start


def sample_order(size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of `size` samples in an epoch, where every source has weight 1."""
    return _permutation(_random_bits(seed, epoch), size)


def _random_bits(seed: int, epoch: int) -> np.random.Philox:
    return np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64))


def _permutation(bits: np.random.Philox, size: int) -> NDArray[np.int64]:
    # numpy keeps the raw bits of a generator the same in every version; its `permutation` it does not.
    order: NDArray[np.int64] = np.argsort(bits.random_raw(size), kind="stable")
    return order


class Loader(Dataset[StepBatch]):
    """One `StepBatch` per optimizer step, from any position on.

    Args:
        dataset: the tokenised samples.
        samples_per_step: the global batch, over all ranks.
        rows_per_micro_batch: most rows in one forward of one rank.
        max_length: the longest row, in tokens.
        packing: lay the samples of a step into few rows, which are about equally long.
        pad_token_id: fills rows up; never a target, whatever it is.
        seed: of the order.
        rank, size: this rank and the number of data-parallel ranks, which share each global batch.
        start: samples already consumed over all ranks; the position to go on from.
        total: the position to stop at, so the last step may be smaller; None: go on for ever.
        shuffle: False keeps the order of the sources.
        num_workers: processes that prepare batches ahead; they change the speed only.
    """

    def __init__(
        self,
        dataset: TokenizedDataset,
        *,
        samples_per_step: int,
        rows_per_micro_batch: int,
        max_length: int,
        packing: bool,
        pad_token_id: int,
        seed: int,
        rank: int = 0,
        size: int = 1,
        start: int = 0,
        total: int | None = None,
        shuffle: bool = True,
        num_workers: int = 0,
    ) -> None:
        assert 0 <= rank < size
        assert samples_per_step > 0
        assert rows_per_micro_batch > 0
        self.dataset = dataset
        self.order = EpochOrder(dataset.ranges, seed=seed, shuffle=shuffle)
        self.samples_per_step = samples_per_step
        self.rows_per_micro_batch = rows_per_micro_batch
        self.max_length = max_length
        self.packing = packing
        self.pad_token_id = pad_token_id
        self.rank = rank
        self.size = size
        self.start = start
        self.total = total
        self.num_workers = num_workers

    def __iter__(self) -> Iterator[StepBatch]:
        positions: Iterable[int] = itertools.count(self.start, self.samples_per_step)
        if self.total is not None:
            positions = range(self.start, self.total, self.samples_per_step)
        steps: DataLoader[StepBatch] = DataLoader(
            self,
            sampler=positions,
            batch_size=None,
            num_workers=self.num_workers,
            collate_fn=_unchanged,
            generator=torch.Generator(),  # its own, so that the caller's random state stays as it is
        )
        return iter(steps)

    def __getitem__(self, position: int) -> StepBatch:
        """This rank's share of the step whose first sample stands at `position`.

        Raises:
            DataError: a sample is longer than `max_length`.
        """
        stop = position + self.samples_per_step
        stop = stop if self.total is None else min(stop, self.total)
        indices = self.order.indices(position, stop)
        lengths = self.dataset.lengths[indices]
        if lengths.max() > self.max_length:
            raise DataError(f"a sample of {lengths.max()} tokens does not fit max_length={self.max_length}")
        shares, count = self._shares(lengths)
        share = [{**self.dataset[int(indices[place])], "position": position + place} for place in shares[self.rank]]
        micro_batches = [
            self._collate([[share[place] for place in row] for row in rows])
            for rows in _chunks(self._rows(lengths[shares[self.rank]]), self.rows_per_micro_batch)
        ]
        # Ranks that shard their weights run every forward together, so none may have fewer than another.
        micro_batches += [self._collate([[EMPTY]]) for _ in range(count - len(micro_batches))]
        return StepBatch(
            micro_batches,
            samples=len(indices),
            tokens=int(lengths[shares[self.rank]].sum()),
            epoch=stop / self.order.samples_per_epoch,
        )

    def _shares(self, lengths: NDArray[np.int32]) -> tuple[list[NDArray[np.intp]], int]:
        """The places of a step's samples by rank, and how many micro-batches all take: as many as the longest needs.

        Equally many each; with packing of about equally many tokens, where that takes no more micro-batches. Rank 0 has
        a sample whenever another has.
        """
        strided = [np.arange(rank, len(lengths), self.size) for rank in range(self.size)]
        if not self.packing:
            return strided, self._micro_batches(strided, lengths)
        longest_first = np.argsort(-lengths, kind="stable").tolist()
        even = [np.array(sorted(share), dtype=np.intp) for share in _even_rows(longest_first, lengths, self.size)]

        def cost(shares: Sequence[NDArray[np.intp]]) -> tuple[int, int]:
            return self._micro_batches(shares, lengths), max(int(lengths[share].sum()) for share in shares)

        costs = [cost(strided), cost(even)]
        return (even if costs[1] < costs[0] else strided), min(costs)[0]

    def _micro_batches(self, shares: Sequence[NDArray[np.intp]], lengths: NDArray[np.int32]) -> int:
        """The most that a rank has."""
        return max(-(-len(self._rows(lengths[share])) // self.rows_per_micro_batch) for share in shares)

    def _rows(self, lengths: NDArray[np.int32]) -> list[list[int]]:
        return pack(lengths, self.max_length) if self.packing else [[place] for place in range(len(lengths))]

    def _collate(self, rows: Sequence[Sequence[Any]]) -> Batch:
        return collate(rows, pad_token_id=self.pad_token_id, packing=self.packing)


EMPTY = {"input_ids": np.zeros(0, dtype=np.int64), "labels": np.zeros(0, dtype=np.int64)}


def eval_batches(
    dataset: TokenizedDataset, *, batch_size: int, pad_token_id: int, rank: int = 0, size: int = 1
) -> Iterator[Batch]:
    """Every sample once, in order, dealt out to the ranks batch by batch.

    Every rank gets the same number of batches; those without samples hold one padding token and no target.
    """
    starts = range(0, len(dataset), batch_size)
    for turn in range(0, len(starts), size):
        mine = starts[turn + rank : turn + rank + 1]
        rows = [[sample] for start in mine for sample in dataset[start : start + batch_size]]
        yield collate(rows or [[EMPTY]], pad_token_id=pad_token_id, packing=False)


def pack(lengths: Sequence[int] | NDArray[np.int32], max_length: int) -> list[list[int]]:
    """Places 0..n-1 laid out in rows of at most `max_length` tokens: as few as first-fit decreasing finds, and even.

    First-fit takes at most 11/9 of the fewest possible rows, plus one (Dósa 2007, doi:10.1007/978-3-540-74450-4_1).
    Rows of one micro-batch are padded to the longest of them, and attention grows with its square.
    """
    places = sorted(range(len(lengths)), key=lambda place: -int(lengths[place]))  # ties in order
    rows: list[list[int]] = []
    free: list[int] = []  # tokens left in each row
    for place in places:
        length = int(lengths[place])
        row = next((index for index, room in enumerate(free) if room >= length), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(max_length)
        rows[row].append(place)
        free[row] -= length
    even = _even_rows(places, lengths, len(rows))
    return min(rows, even, key=lambda rows: max((sum(int(lengths[place]) for place in row) for row in rows), default=0))


def _even_rows(places: Sequence[int], lengths: Any, number: int) -> list[list[int]]:
    """So many rows, the longest at most 4/3 of what is possible: each place into the emptiest row, the longest first
    (Graham 1969, doi:10.1137/0117039).
    """
    rows: list[list[int]] = [[] for _ in range(number)]
    held = [(0, row) for row in range(number)]  # a heap of (tokens, row)
    for place in places:
        tokens, row = heapq.heappop(held)
        rows[row].append(place)
        heapq.heappush(held, (tokens + int(lengths[place]), row))
    return rows


def collate(rows: Sequence[Sequence[Any]], *, pad_token_id: int, packing: bool) -> Batch:
    """Rows of samples (`input_ids`, `labels`), each row laid end to end and padded to the longest.

    A sample's `position` in the run, where it has one, goes into the layout.
    With `packing`, positions count from 0 in each sample and again in the padding, which so joins no sample.
    """
    width = max(1, max(sum(len(sample["input_ids"]) for sample in row) for row in rows))
    input_ids = np.full((len(rows), width), pad_token_id, dtype=np.int64)
    labels = np.full((len(rows), width), IGNORE, dtype=np.int64)
    positions = np.zeros((len(rows), width), dtype=np.int64)
    layout = tuple(tuple((sample.get("position", -1), len(sample["input_ids"])) for sample in row) for row in rows)
    for index, row in enumerate(rows):
        end = 0
        for sample in row:
            begin, end = end, end + len(sample["input_ids"])
            input_ids[index, begin:end] = sample["input_ids"]
            labels[index, begin:end] = sample["labels"]
            positions[index, begin:end] = np.arange(end - begin)
        positions[index, end:] = np.arange(width - end)
    position_ids = torch.from_numpy(positions) if packing else None
    return Batch(torch.from_numpy(input_ids), torch.from_numpy(labels), position_ids, layout)


@torch.no_grad()
def check_packing(model: nn.Module, *, rows: int = 2) -> None:
    """Prove by a tiny forward that packed samples do not see each other and give what they give alone.

    Args:
        model: a causal language model with `config.vocab_size`, or an engine around it.
        rows: the rows of a micro-batch; some attention kernels keep samples apart in one row only.

    Raises:
        ModelError: packing would change the results of this model.
    """
    inner: Any = getattr(model, "module", model)
    vocab_size = int(inner.config.vocab_size)
    samples = [_probe(length, step, vocab_size) for length, step in ((7, 3), (5, 7), (6, 11))]
    # The second row holds one sample and then padding, the other kind of row that packing makes.
    packed = collate([samples[:2], samples[2:]][:rows], pad_token_id=0, packing=True)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        together = model(**packed.to(device).inputs(), use_cache=False).logits.float()
        rows_alone = [torch.from_numpy(sample["input_ids"])[None].to(device) for sample in samples]
        alone = [model(input_ids=row, use_cache=False).logits[0].float() for row in rows_alone]
    except TypeError as error:  # a forward without position_ids
        raise _cannot_pack(inner, str(error)) from error
    finally:
        model.train(was_training)
    places = [(0, 0), (0, 7), (1, 0)]  # row and column where each sample begins
    for expected, (row, begin) in zip(alone, places, strict=True):
        if row < rows:
            _compare(inner, together[row, begin : begin + len(expected)], expected)


def _probe(length: int, step: int, vocab_size: int) -> dict[str, NDArray[np.int64]]:
    ids = (1 + step * np.arange(1, length + 1, dtype=np.int64)) % vocab_size
    return {"input_ids": ids, "labels": ids}


def _compare(model: nn.Module, found: Tensor, expected: Tensor) -> None:
    dtype, device_type = next(model.parameters()).dtype, expected.device.type
    exact = dtype == torch.float32 and not torch.is_autocast_enabled(device_type)
    tolerance = (1e-4 if exact else 5e-2) * float(expected.std())
    difference = float((found - expected).abs().max())
    if not difference <= tolerance:  # NaN is a difference too
        raise _cannot_pack(model, f"the logits of a packed sample are off by {difference:.2g}")


def _cannot_pack(model: nn.Module, reason: str) -> ModelError:
    family = getattr(model.config, "model_type", type(model).__name__)
    return ModelError(f"the {family} model does not keep packed samples apart: {reason}; set data.packing=false")


def _chunks(rows: list[list[int]], size: int) -> list[list[list[int]]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _unchanged(step: Any) -> Any:
    return step
