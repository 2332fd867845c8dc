"""Sequence parallelism: between the blocks of a layer each tensor-parallel rank holds a share of the positions.

The residual stream, the norms and their activations then take 1 / ranks of the memory (arXiv 2205.05198). The first
layer of a stage splits its input along the sequence and the last one gathers its output, so that everything around
the layers is as without.

Shapes: B rows, L positions, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from torch import Tensor, nn

from collie_core.errors import ModelError
from collie_core.model.blocks import Positions, block_of, change_first, change_hidden, make_blocks
from collie_core.model.collectives import Shares, gather_from, split_to
from collie_core.model.layers import RowParallel, become
from collie_core.topology import Axis


class SequenceParallel(nn.Module):
    """A decoder layer whose input and output are shares of the positions, [B, L / ranks, H]."""

    positions: Positions

    def forward(self, *inputs: Any, whole_length: int, **options: Any) -> Any:
        """The stock forward. `whole_length` comes as an argument, for gradient checkpointing to bring it again."""
        with self.positions.of(whole_length):
            return super().forward(*inputs, **options)


def divide_positions(layers: Mapping[str, nn.Module], axis: Axis) -> None:
    """Make the layers of a stage, by their names and with tensor-parallel modules, sequence parallel in place.

    Raises:
        ModelError: a layer has a part that is neither sharded nor known to treat every position alone.
    """
    positions = Positions(axis)
    for name, layer in layers.items():
        make_blocks(layer, axis, positions)
        _check_rest(layer, name)
        become(layer, SequenceParallel)
        layer.positions = positions  # type: ignore[assignment]
        for module in layer.modules():
            module.collie_positions = positions  # type: ignore[assignment]
        layer.register_forward_pre_hook(_tell_length(positions), with_kwargs=True)
    first, *_, last = [*layers.values(), *layers.values()]
    first.register_forward_pre_hook(_split_input(positions), with_kwargs=True, prepend=True)
    last.register_forward_hook(_gather_output(positions))


def sequence_parallel_layers(model: nn.Module) -> list[SequenceParallel]:
    """The layers that hold shares of the positions."""
    return [module for module in model.modules() if isinstance(module, SequenceParallel)]


def gathered_positions(module: nn.Module, output: Tensor) -> Tensor | None:
    """[B, L, H] of an output [B, L / ranks, H] within a layer; None of one that is whole. Collective."""
    positions = cast("Positions | None", vars(module).get("collie_positions"))
    if positions is None:
        return None
    shares = positions.shares if positions.in_layer else Shares.even(positions.length, positions.axis)
    # Too few positions for all ranks: a share could not be told from a whole everywhere.
    if shares.whole < positions.axis.size or output.ndim != 3 or output.shape[1] != shares.size():
        return None
    return gather_from(output, shares, 1)


def partial_parameters(layer: SequenceParallel) -> Iterator[nn.Parameter]:
    """The parameters of a layer that act on this rank's positions alone: each rank has a part of their gradient."""
    yield from layer.parameters(recurse=False)
    for child in layer.children():
        block = block_of(child)
        if block is None:
            yield from child.parameters()
        elif block.only_shards:
            row = next(module for module in child.modules() if isinstance(module, RowParallel))
            if isinstance(row.bias, nn.Parameter):
                yield row.bias


def _check_rest(layer: nn.Module, name: str) -> None:
    whole = {child for child, module in layer.named_children() if block_of(module) is not None}
    for parameter, value in layer.named_parameters():
        if parameter.partition(".")[0] not in whole and value.ndim > 1:
            raise ModelError(
                f"parallel.sequence_parallel: {name}.{parameter} of shape {list(value.shape)} is neither split over "
                "tensor-parallel ranks nor part of a norm, so it may look at several positions at once; "
                "set parallel.sequence_parallel=false"
            )


# The hooks are closures: a copy of a module has the same function, and with it the same group.


def _split_input(positions: Positions) -> Any:
    def split(hidden: Tensor) -> Tensor:
        positions.length = hidden.shape[1]
        return split_to(hidden, Shares.even(positions.length, positions.axis), 1)

    return lambda module, inputs, options: change_hidden(split, inputs, options)


def _tell_length(positions: Positions) -> Any:
    return lambda module, inputs, options: (inputs, {**options, "whole_length": positions.length})


def _gather_output(positions: Positions) -> Any:
    def gather(hidden: Tensor) -> Tensor:
        return gather_from(hidden, Shares.even(positions.length, positions.axis), 1)

    return lambda module, inputs, output: change_first(gather, output)
