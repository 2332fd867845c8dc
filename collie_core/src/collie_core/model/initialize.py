"""Random weights that are the same on every topology, from the stock initialisation of a family."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from collie_core.errors import ModelError
from collie_core.model.boxes import Box, slices
from collie_core.model.weights import Dtypes, ShardReader, Store, assign, own_parameters, tie

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from collie_core.model.partition import Partition, Placement
    from collie_core.topology import Axis, Topology


def initialize(
    model: PreTrainedModel,
    stock: PreTrainedModel,
    partition: Partition,
    topology: Topology,
    *,
    seed: int,
    dtype: torch.dtype,
    store: Store = assign,
) -> None:
    """Fill this rank's part of `model` (cut and sharded, on the meta device) with random weights.

    Each module is initialised at its whole shape in `stock`, the same model whole and on the meta device, with a
    random state that depends on `seed` and its name alone; then this rank takes its slices. So no more than the
    parameters of one module exist beside the model's own at a time.

    Raises:
        ModelError: a parameter that the initialisation of the family leaves out.
    """
    dtypes = Dtypes(model, dtype)
    with torch.random.fork_rng(devices=[]):
        for path, leaves in _by_module(model, partition):
            values = cache(partial(_initial_values, stock, path, leaves, seed))
            for leaf in leaves:
                name = f"{path}.{leaf}" if path else leaf
                dtype = dtypes.of(name, stock.get_parameter(name).dtype)
                reader = _Slices(values, leaf, partition.placements[name], topology.tp, dtype)
                store(model.get_submodule(path), leaf, reader.shape, reader)
    tie(model, partition)


def _by_module(model: nn.Module, partition: Partition) -> Iterator[tuple[str, list[str]]]:
    """The parameters that this rank fills, by module: (its name, their names in it)."""
    found: dict[str, list[str]] = {}
    for _, leaf, name in own_parameters(model, partition):
        found.setdefault(name.removesuffix(leaf).removesuffix("."), []).append(leaf)
    yield from found.items()


def _initial_values(stock: PreTrainedModel, path: str, leaves: list[str], seed: int) -> dict[str, Tensor]:
    """The values of a module's own parameters at their whole shape, in float32.

    A module around it may have a say too: GPT-2 scales its output projections from the layer that holds them. Those
    are asked after it, as transformers does, while every other parameter is without memory and so stays untouched.
    """
    module = stock.get_submodule(path)
    empty = {leaf: module._parameters[leaf] for leaf in leaves}
    values = {leaf: _not_a_number(parameter) for leaf, parameter in empty.items() if parameter is not None}
    torch.manual_seed(_seed_of(seed, path))
    try:
        for leaf, value in values.items():
            module._parameters[leaf] = nn.Parameter(value, requires_grad=value.is_floating_point())
        for initializer, around in _initializers(stock, path):
            initializer._init_weights(around)
    finally:
        module._parameters.update(empty)
    for leaf, value in values.items():
        if value.is_floating_point() and not all(bool(end.isfinite()) for end in value.aminmax()):
            raise ModelError(
                f"{path}.{leaf} has no random weights: the _init_weights of {type(stock).__name__} leaves it out; "
                "train this family from pretrained weights (model.model_name_or_path)"
            )
    return values


def _not_a_number(parameter: Tensor) -> Tensor:
    if not parameter.is_floating_point():
        return torch.zeros(parameter.shape, dtype=parameter.dtype)
    return torch.full(parameter.shape, torch.nan, dtype=torch.float32)


def _initializers(stock: PreTrainedModel, path: str) -> Iterator[tuple[PreTrainedModel, nn.Module]]:
    """The module and those around it, from the inside out, each with the model whose rules hold for it."""
    from transformers import PreTrainedModel

    names = path.split(".") if path else []
    chain: list[nn.Module] = [stock]
    for name in names:
        chain.append(getattr(chain[-1], name))
    for depth in range(len(chain) - 1, -1, -1):
        owner = next(module for module in reversed(chain[: depth + 1]) if isinstance(module, PreTrainedModel))
        yield owner, chain[depth]


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest(), "little")


class _Slices(ShardReader):
    """From a parameter that stands whole, among those of its module, which are made when the first is read."""

    def __init__(
        self, module: Callable[[], dict[str, Tensor]], leaf: str, placement: Placement, axis: Axis, dtype: torch.dtype
    ) -> None:
        super().__init__(placement, axis, dtype)
        self.module, self.leaf = module, leaf

    def fill(self, values: Tensor, there: Box, here: Box) -> None:
        """See `ShardReader`."""
        values[slices(here)] = self.module()[self.leaf][slices(there)]
