"""Blocks of a layer, attention and MLP, and the collectives at either end of them.

Where the sharded modules of a block alone use its input, each leaves the gradient of it partial and the block sums it
once for all of them. Under sequence parallelism the block also gathers its input and gives this rank's share of its
output. Whether a block can work so is found out from the modules that it has, and again when adapters have come.

Shapes: B rows, L positions, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from collie_core.errors import ModelError
from collie_core.model.collectives import Shares, copy_to, gather_from, gather_summed, split_to
from collie_core.model.layers import ColumnParallel, ExpertsParallel, RowParallel, shard_of
from collie_core.topology import Axis


class Positions:
    """How the positions of a sequence lie over the ranks. Copies of a module share it."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self.length = 0  # of the sequence that goes through the layers
        self._shares: Shares | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Positions:
        return self

    @contextmanager
    def of(self, length: int) -> Iterator[None]:
        """Inside, `shares` are those of a sequence of so many positions."""
        before, self._shares = self._shares, Shares.even(length, self.axis)
        try:
            yield
        finally:
            self._shares = before

    @property
    def in_layer(self) -> bool:
        """Whether a layer is running, in which tensors may be shares."""
        return self._shares is not None

    @property
    def shares(self) -> Shares:
        """Of the sequence in the layer that is running."""
        assert self._shares is not None, "only within a layer"
        return self._shares


@dataclass(eq=False)
class Block:
    """What stands on a block as `collie_block`, and on its sharded modules as `block`. Copies of them share it."""

    axis: Axis
    positions: Positions | None  # under sequence parallelism
    only_shards: bool = False  # sharded modules alone use its input, and one `RowParallel` makes its output
    sums_inputs: bool = False  # in the call that is running: its modules leave the gradients of its input partial

    def __deepcopy__(self, memo: dict[int, Any]) -> Block:
        return self


def block_of(module: nn.Module) -> Block | None:
    """What stands on a module that is a block."""
    return cast("Block | None", vars(module).get("collie_block"))


def make_blocks(layer: nn.Module, axis: Axis, positions: Positions | None) -> None:
    """Make blocks of the children of a layer that have sharded modules, in place."""
    for module in layer.children():
        inner = [part for part in module.modules() if isinstance(part, ColumnParallel | RowParallel | ExpertsParallel)]
        if not inner:
            continue
        block = Block(axis, positions)
        module.collie_block = block  # type: ignore[assignment]
        for part in inner:
            if not isinstance(part, ExpertsParallel):
                part.block = block
        module.register_forward_pre_hook(_begin(block), with_kwargs=True)
        module.register_forward_hook(_end(block))
    settle_blocks(layer)


def settle_blocks(model: nn.Module) -> None:
    """Find out how each block can work with the modules that it has now."""
    for module in model.modules():
        if block := block_of(module):
            block.only_shards = _only_shards(module)


def _only_shards(module: nn.Module) -> bool:
    rows = [part for part in module.modules() if isinstance(part, RowParallel)]
    return len(rows) == 1 and all(
        _is_plain(part) for part in module.modules() if next(part.parameters(recurse=False), None) is not None
    )


def _is_plain(module: nn.Module) -> bool:
    if isinstance(module, ColumnParallel):
        return not module.gathers
    if isinstance(module, RowParallel):
        return not module.splits
    facts = shard_of(module)  # else a norm on this rank's heads
    return facts is not None and all(name in facts.partial for name, _ in module.named_parameters(recurse=False))


# The hooks are closures: a copy of a module has the same function, and with it the same group.


def _begin(block: Block) -> Any:
    def enter(hidden: Tensor) -> Tensor:
        if block.positions is not None:
            return (gather_summed if block.sums_inputs else gather_from)(hidden, block.positions.shares, 1)
        return copy_to(hidden, block.axis) if block.sums_inputs else hidden

    def hook(module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
        # A second tensor with a gradient may be one that the block's modules use, or one that is added at its end.
        is_only_input = _count_differentiable([*inputs, *options.values()]) <= 1
        if block.positions is not None and block.only_shards and not is_only_input:
            raise ModelError(
                f"parallel.sequence_parallel: a {type(module).__name__} takes several tensors with gradients, which is "
                "not supported; set parallel.sequence_parallel=false"
            )
        block.sums_inputs = block.only_shards and is_only_input
        return change_hidden(enter, inputs, options)

    return hook


def _end(block: Block) -> Any:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        whole, block.sums_inputs = not block.sums_inputs, False
        if block.positions is None or not whole:
            return output
        shares = block.positions.shares
        return change_first(lambda hidden: split_to(hidden, shares, 1), output)

    return hook


def _count_differentiable(values: list[Any]) -> int:
    flat = [item for value in values for item in (value if isinstance(value, tuple | list) else [value])]
    return sum(isinstance(item, Tensor) and item.requires_grad for item in flat)


def change_hidden(
    function: Callable[[Tensor], Tensor], inputs: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a module with other hidden states, which come first or by their name."""
    if inputs:
        return (function(inputs[0]), *inputs[1:]), options
    return inputs, {**options, "hidden_states": function(options["hidden_states"])}


def change_first(function: Callable[[Tensor], Tensor], output: Any) -> Any:
    """The output of a module with other hidden states, which may come in a tuple."""
    return (function(output[0]), *output[1:]) if isinstance(output, tuple) else function(output)
