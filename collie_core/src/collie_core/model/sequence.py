"""Sequence parallelism: between the sharded blocks of a layer each tensor-parallel rank holds a share of the positions.

The residual stream, the norms and their activations then take 1 / ranks of the memory (arXiv 2205.05198). The first
layer of a stage splits its input along the sequence and the last one gathers its output, so that everything around
the layers is as without. A block, a child of a layer with sharded modules in it, gathers its input and gives its
share of the output.

Shapes: B rows, L positions, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from collie_core.errors import ModelError
from collie_core.model.collectives import Shares, gather_from, gather_summed, split_to
from collie_core.model.layers import ColumnParallel, ExpertsParallel, RowParallel, become, shard_of
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
    """A child of a layer that works on whole sequences. Its sharded modules know it, and copies of them share it.

    When they alone use its input and one `RowParallel` makes its output, they have one collective at either end:
    each leaves the gradient of its input partial for the block to sum, and the output is summed and split in one.
    Otherwise they work as without sequence parallelism, and the block splits the output.
    """

    positions: Positions
    sums_inputs: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Block:
        return self


class SequenceParallel(nn.Module):
    """A decoder layer whose input and output are shares of the positions, [B, L / ranks, H]."""

    positions: Positions
    blocks: dict[str, Block]  # by the name of the child

    def forward(self, *inputs: Any, whole_length: int, **options: Any) -> Any:
        """The stock forward. `whole_length` comes as an argument, for gradient checkpointing to bring it again."""
        with self.positions.of(whole_length):
            return super().forward(*inputs, **options)


def divide_positions(layers: Mapping[str, nn.Module], axis: Axis) -> None:
    """Make the layers of a stage, by their names and tensor parallel already, sequence parallel too, in place.

    Raises:
        ModelError: a layer has a part that is neither sharded nor known to treat every position alone.
    """
    positions = Positions(axis)
    for name, layer in layers.items():
        blocks = {child: Block(positions) for child, module in layer.named_children() if _is_block(module)}
        _check_rest(layer, name, blocks)
        become(layer, SequenceParallel)
        layer.positions, layer.blocks = positions, blocks  # type: ignore[assignment]
        for child, block in blocks.items():
            _gather_around(layer.get_submodule(child), block)
        layer.register_forward_pre_hook(_tell_length(positions), with_kwargs=True)
    first, *_, last = [*layers.values(), *layers.values()]
    first.register_forward_pre_hook(_split_input(positions), with_kwargs=True, prepend=True)
    last.register_forward_hook(_gather_output(positions))
    settle_blocks(layers.values())


def settle_blocks(layers: Iterable[nn.Module]) -> None:
    """Find out how each block can work with the modules that it has now; adapters change that."""
    for layer in layers:
        assert isinstance(layer, SequenceParallel)
        for name, block in layer.blocks.items():
            block.sums_inputs = _only_shards(layer.get_submodule(name))


def sequence_parallel_layers(model: nn.Module) -> list[SequenceParallel]:
    """The layers that hold shares of the positions."""
    return [module for module in model.modules() if isinstance(module, SequenceParallel)]


def partial_parameters(layer: SequenceParallel) -> Iterator[nn.Parameter]:
    """The parameters of a layer that act on this rank's positions alone: each rank has a part of their gradient."""
    yield from layer.parameters(recurse=False)
    for name, child in layer.named_children():
        if name not in layer.blocks:
            yield from child.parameters()
        elif layer.blocks[name].sums_inputs:
            row = next(module for module in child.modules() if isinstance(module, RowParallel))
            if isinstance(row.bias, nn.Parameter):
                yield row.bias


def _is_block(module: nn.Module) -> bool:
    return any(isinstance(inner, ColumnParallel | RowParallel | ExpertsParallel) for inner in module.modules())


def _check_rest(layer: nn.Module, name: str, blocks: dict[str, Block]) -> None:
    for parameter, value in layer.named_parameters():
        child = parameter.partition(".")[0]
        if child not in blocks and value.ndim > 1:
            raise ModelError(
                f"parallel.sequence_parallel: {name}.{parameter} of shape {list(value.shape)} is neither split over "
                "tensor-parallel ranks nor part of a norm, so it may look at several positions at once; "
                "set parallel.sequence_parallel=false"
            )


def _only_shards(block: nn.Module) -> bool:
    """Whether all parameters of a block are those of sharded modules that use its input and make its output."""
    rows = [module for module in block.modules() if isinstance(module, RowParallel)]
    return len(rows) == 1 and all(
        _is_plain(module) for module in block.modules() if next(module.parameters(recurse=False), None) is not None
    )


def _is_plain(module: nn.Module) -> bool:
    if isinstance(module, ColumnParallel):
        return not module.gathers
    if isinstance(module, RowParallel):
        return not module.splits
    shard = shard_of(module)  # a norm on this rank's heads
    return shard is not None and all(name in shard.partial for name, _ in module.named_parameters(recurse=False))


def _gather_around(module: nn.Module, block: Block) -> None:
    for inner in module.modules():
        if isinstance(inner, ColumnParallel | RowParallel):
            inner.block = block
    module.register_forward_pre_hook(_gather_input(block), with_kwargs=True)
    module.register_forward_hook(_split_output(block))


# The hooks are closures: a copy of a module has the same function, and with it the same group.


def _split_input(positions: Positions) -> Any:
    def split(hidden: Tensor) -> Tensor:
        positions.length = hidden.shape[1]
        return split_to(hidden, Shares.even(positions.length, positions.axis), 1)

    return lambda module, inputs, options: _change_hidden(split, inputs, options)


def _tell_length(positions: Positions) -> Any:
    return lambda module, inputs, options: (inputs, {**options, "whole_length": positions.length})


def _gather_output(positions: Positions) -> Any:
    def gather(hidden: Tensor) -> Tensor:
        return gather_from(hidden, Shares.even(positions.length, positions.axis), 1)

    return lambda module, inputs, output: _change_first(gather, output)


def _gather_input(block: Block) -> Any:
    def gather(hidden: Tensor) -> Tensor:
        function = gather_summed if block.sums_inputs else gather_from
        return function(hidden, block.positions.shares, 1)

    return lambda module, inputs, options: _change_hidden(gather, inputs, options)


def _split_output(block: Block) -> Any:
    def split(hidden: Tensor) -> Tensor:
        return split_to(hidden, block.positions.shares, 1)

    return lambda module, inputs, output: output if block.sums_inputs else _change_first(split, output)


def _change_hidden(function: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The arguments of a module with other hidden states, which come first or by their name."""
    if inputs:
        return (function(inputs[0]), *inputs[1:]), options
    return inputs, {**options, "hidden_states": function(options["hidden_states"])}


def _change_first(function: Any, output: Any) -> Any:
    """The output of a module with other hidden states, which may come in a tuple."""
    return (function(output[0]), *output[1:]) if isinstance(output, tuple) else function(output)
