"""Applies an element-wise update to many tensors in one pass over memory.

An update is a free function `update(param, grad, *state, **coefficients)` that changes tensors of one shape in place.
Called on a whole model it would write every intermediate result to memory. Here it is compiled into one loop, or called
on blocks that stay in the cache, so no intermediate result is as large as the parameters.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from collie_core.api import RunError

logger = logging.getLogger("collie")

Row = tuple[Tensor, ...]
"""(param, grad, *state): tensors of one shape. The update writes to all but the gradient."""

CPU = torch.device("cpu")
"""Not by its type: where a plan stands for a GPU, its fake tensors are on another device of that type."""
CACHE_BLOCK = 2**17
"""Elements: four such blocks of float32 are 2 MiB, about a core's cache. Half or twice as many is no faster."""
GPU_BUNDLE = 2**24
"""Elements in one launch on a GPU: bounds the intermediate results, 64 MiB each in float32."""
WORTH_COMPILING = 10_000_000
"""Elements: a cold compilation takes 3 to 30 s, and a step over so many saves some 10 ms."""


@dataclass(frozen=True)
class Update:
    """One update rule in two forms, which give the same bits.

    Args:
        one: of `(param, grad, *state)`. `torch.compile` reads it too; then its coefficients are 0-d tensors, which
            rules out arguments that must be numbers, as `alpha=` and `value=`.
        many: the same over lists of tensors, with one kernel launch per operation on a GPU.
    """

    one: Callable[..., None]
    many: Callable[..., None]


def apply(
    update: Update, rows: Sequence[Row], coefficients: Mapping[str, float], *, kernel: str = "auto", elements: int
) -> None:
    """Call `update` with every row, in place.

    Args:
        rows: of one device and one dtype.
        coefficients: as the update uses them (1 - beta, not beta). They are rounded to the dtype of the tensors once,
            and may change with each call at no cost.
        kernel: "eager", "compiled", or "auto": compiled where that works and `elements` make it worth while.
        elements: of all tensors that are updated in this step, whether they are in `rows` or not.

    Raises:
        RunError: `kernel` is "compiled", and nothing can be compiled here.
    """
    if kernel == "compiled" or (kernel == "auto" and elements >= WORTH_COMPILING and update not in _NOT_COMPILED):
        rows, reason = _compiled(update, rows, coefficients)
        if reason and kernel == "compiled":
            raise RunError(
                f"optimizer.kernel=compiled, but torch.compile fails here: {reason}. Install a C++ compiler and the "
                "headers of Python (for a GPU: Triton), or choose kernel=auto or kernel=eager"
            )
        if reason:
            _NOT_COMPILED.add(update)
            logger.warning(
                "the optimizer's step is not compiled and takes longer, because torch.compile fails: %s", reason
            )
    _eager(update, rows, coefficients)


_NOT_COMPILED: set[Update] = set()  # a failed compilation costs seconds; do not repeat it each step


# -- compiled -----------------------------------------------------------------------------------------------


def _compiled(update: Update, rows: Sequence[Row], coefficients: Mapping[str, float]) -> tuple[Sequence[Row], str]:
    """The rows that are not updated, and why: compiling failed, which leaves the tensors as they were."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException  # takes a second

    # Half precision is calculated in float32 and rounded once.
    dtype = torch.float64 if rows[0][0].dtype == torch.float64 else torch.float32
    # As numbers they would become constants of the code, which would be compiled again for each learning rate.
    scalars = {name: torch.tensor(value, dtype=dtype) for name, value in coefficients.items()}
    run = _function(update.one)
    for number, row in enumerate(rows):
        if row[0].numel() < 2 or not _is_flat(row):  # torch.compile makes special cases of the sizes 0 and 1
            update.one(*row, **coefficients)
            continue
        try:
            # `data` gives no views: torch.compile would look at what they are views of, and at requires_grad.
            run(*(tensor.view(-1).data for tensor in row), **scalars)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            return rows[number:], str(error).partition("\n")[0] or type(error).__name__
        torch.autograd.graph.increment_version(row[0])  # what `data` keeps from autograd
    return [], ""


@functools.cache
def _function(update: Callable[..., None]) -> Callable[..., None]:
    compiled: Callable[..., None] = torch.compile(update, dynamic=True, fullgraph=True)
    return compiled


def entries_at_a_time(device: torch.device, on_cpu: int = CACHE_BLOCK) -> int:
    """How large the blocks of an update are: on a GPU so large that launches do not count."""
    return on_cpu if device == CPU else GPU_BUNDLE


# -- eager --------------------------------------------------------------------------------------------------


def _eager(update: Update, rows: Sequence[Row], coefficients: Mapping[str, float]) -> None:
    if all(row[0].device == CPU for row in rows):
        for block in blocks(rows, CACHE_BLOCK):
            update.one(*block, **coefficients)
    else:
        for bundle in bundles(rows, GPU_BUNDLE):
            update.many(*map(list, zip(*bundle, strict=True)), **coefficients)


def blocks(rows: Iterable[Row], elements: int) -> Iterator[Row]:
    """Each row in parts of at most `elements`. A row that does not lie in one piece of memory stays whole."""
    for row in rows:
        if row[0].numel() <= elements or not _is_flat(row):
            yield row
        else:
            yield from zip(*(tensor.view(-1).split(elements) for tensor in row), strict=True)


def bundles(rows: Iterable[Row], elements: int) -> Iterator[list[Row]]:
    """Lists of rows, or parts of them, that have `elements` together or a little more (at most twice as many)."""
    bundle: list[Row] = []
    collected = 0
    for block in blocks(rows, elements):
        bundle.append(block)
        collected += block[0].numel()
        if collected >= elements:
            yield bundle
            bundle, collected = [], 0
    if bundle:
        yield bundle


def _is_flat(row: Row) -> bool:
    return all(tensor.is_contiguous() for tensor in row)
