"""The states of all parameters of a model, one whole tensor at a time: gathered for a checkpoint, dealt out from one.

In the file a state is called `<parameter>/<state>`, by the names of the whole model, and is whole, so that it says
nothing of the ranks that wrote it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from collie_core.checkpoint.files import CheckpointError
from collie_core.engine.state import WEIGHT, ParameterStates
from collie_core.errors import PluginError
from collie_core.model.adapters import adapter_of
from collie_core.model.boxes import whole
from collie_core.model.files import Kind
from collie_core.model.layout import file_shapes, shorten
from collie_core.model.part import Part, part_of
from collie_core.model.partition import Placement
from collie_core.model.weights import Checkpoint, FileReader, Piece, sent_to_main

if TYPE_CHECKING:
    from collie_core.topology import Topology

Inventory = Mapping[str, Mapping[str, Kind]]
"""Parameter -> state -> what it is when whole; in the order in which all ranks go through them."""


@dataclass(frozen=True)
class WholeStates:
    """What the ranks hold of the parameters, as if one of them held it all.

    Args:
        states: of this rank.
        placements: of all trained parameters of the model, in its order.
        factored: states that lack a dimension of their parameter; see `OptimizerCan.factored_state`.
        topology: of the run.
        part: where weights lie in the files of an export; None: they are not read from there.
    """

    states: ParameterStates
    placements: Mapping[str, Placement]
    factored: Mapping[str, int]
    topology: Topology
    part: Part | None

    @classmethod
    def of(
        cls, model: nn.Module, states: ParameterStates, factored: Mapping[str, int], topology: Topology
    ) -> WholeStates:
        """Those of a model, of this rank's part of one, or of the adapter on it. Collective."""
        part, adapter = part_of(model), adapter_of(model)
        if adapter is not None:
            return cls(states, adapter.placements, factored, topology, None)
        if part is None:
            held = {name: Placement(name, states.kinds(name)[WEIGHT].shape, 0) for name in states.parameters}
            return cls(states, held, factored, topology, None)
        trained = set().union(*topology.gather_objects(set(states.parameters)))
        placements = {name: place for name, place in part.partition.placements.items() if name in trained}
        return cls(states, placements, factored, topology, part)

    # -- out ---------------------------------------------------------------------------------------------------

    def inventory(self) -> Inventory:
        """What there is. Collective."""
        mine: dict[str, dict[str, Kind]] = {}
        if self.topology.dp.rank == self.topology.tp.rank == 0:
            for name in self.states.parameters:
                kinds = self.states.kinds(name)
                mine[name] = {
                    key: Kind(self._placement(name, key, kind.shape).shape, kind.dtype) for key, kind in kinds.items()
                }
        everyone = {name: kinds for found in self.topology.gather_objects(mine) for name, kinds in found.items()}
        return {name: everyone[name] for name in self.placements}

    def stream(self, inventory: Inventory) -> Iterator[tuple[str, Tensor | None]]:
        """Every state of an inventory by its name in the file: whole on the main rank, None on the others.

        Collective: every rank goes through all of it. A value may be a view, good until the next one is asked for.
        """
        for name, kinds in inventory.items():
            stage = self.placements[name].stage
            here = self.states.kinds(name) if self.topology.pp.rank == stage else {}
            for key, kind in kinds.items():
                own = self.states.get(name, key) if here else None
                placement = self._placement(name, key, here[key].shape) if here else None
                yield f"{name}/{key}", sent_to_main(own, placement, stage, kind, self.topology)

    # -- in ----------------------------------------------------------------------------------------------------

    def load(self, file: Checkpoint, model: Checkpoint | None) -> None:
        """Give this rank's part of every state in a file to the engine. Collective.

        Args:
            file: of states.
            model: an export with the weights; None: they are in `file`.

        Raises:
            CheckpointError: they are those of another model.
        """
        found: dict[str, list[str]] = {name: [] for name in self.placements}
        for full in file.keys():  # noqa: SIM118  (no mapping)
            name, _, key = full.rpartition("/")
            if name not in found:
                raise CheckpointError(f"{file.name} is of another model: no place for {name}")
            found[name].append(key)
        shapes = {} if self.part is None else file_shapes(self.part.layout)
        for name in self.states.parameters:
            for key in found[name]:
                self._put(name, key, file)
            if WEIGHT not in found[name]:
                self._put_weight(name, model, shapes, file.name)
        self.states.finish()

    def _put(self, name: str, key: str, file: Checkpoint) -> None:
        full, place = f"{name}/{key}", self.placements[name]
        shape = file.shape(full)
        placement = self._placement_of_whole(name, key, shape)
        if placement is None or (key == WEIGHT and shape != place.shape):
            raise CheckpointError(
                f"{file.name} is of another model or optimizer: {key} of {name} has the shape {list(shape)}, and "
                f"the parameter has {list(place.shape)}"
            )
        box = whole(shape)
        reader = FileReader(file, [Piece(full, box, box)], placement, self.topology.tp, file.dtype(full))
        self.states.put(name, key, reader.shape, reader)

    def _put_weight(self, name: str, model: Checkpoint | None, shapes: Mapping[str, Sequence[int]], file: str) -> None:
        if model is None or self.part is None:
            raise CheckpointError(f"{file} lacks the weights of {name}")
        pieces, there = self.part.layout[name], set(model.keys())
        for key in {piece.key for piece in pieces}:
            if key not in there or model.shape(key) != shapes[key]:
                raise CheckpointError(f"{model.name} is of another model: {key} is missing or has another shape")
        dtype = model.dtype(pieces[0].key)
        reader = FileReader(model, pieces, self.placements[name], self.topology.tp, dtype)
        self.states.put(name, WEIGHT, reader.shape, reader)

    # -- how a state lies along its parameter --------------------------------------------------------------------

    def _placement(self, name: str, key: str, local: tuple[int, ...]) -> Placement:
        """Of a state that has the shape `local` here.

        Raises:
            PluginError: nobody knows how it is cut.
        """
        parameter, axis = self.placements[name], self.topology.tp
        for placement in self._possible(parameter, key):
            if placement.local_shape(axis.size, axis.rank) == local:
                return placement
        if parameter.rule is None:
            return replace(parameter, shape=local)
        raise PluginError(
            f"the optimizer keeps {key} of {name} in the shape {list(local)}, neither that of the parameter nor one "
            "declared in OptimizerCan.factored_state: checkpoints cannot tell how tensor-parallel ranks share it"
        )

    def _placement_of_whole(self, name: str, key: str, shape: tuple[int, ...]) -> Placement | None:
        """The same of a whole state; None when the parameter has no such state."""
        parameter = self.placements[name]
        fits = next((place for place in self._possible(parameter, key) if place.shape == shape), None)
        if fits is None and parameter.rule is None:
            return replace(parameter, shape=shape)
        return fits

    def _possible(self, parameter: Placement, key: str) -> list[Placement]:
        """What a state can be: of the shape of its parameter, one number, or what it is declared to be."""
        shape, rule = parameter.shape, parameter.rule
        if key in self.factored and len(shape) >= 2:
            lacks = self.factored[key] % len(shape)
            if rule is not None:
                dim = rule.dim - (lacks < rule.dim)
                rule = None if rule.dim == lacks else replace(rule, dim=dim)
            return [replace(parameter, shape=shape[:lacks] + shape[lacks + 1 :], rule=rule)]
        return [parameter, replace(parameter, shape=(), rule=None)]


def require_same_parameters(saved: Mapping[str, Sequence[int]], states: WholeStates, source: str) -> None:
    """Compare the parameters of a checkpoint with those that are trained.

    Raises:
        CheckpointError: they have other names or shapes; names some.
    """
    trained = {name: list(place.shape) for name, place in states.placements.items()}
    if unexpected := sorted(set(saved) - set(trained)):
        raise CheckpointError(f"{source} is of another model: no place for {shorten(unexpected)}")
    if missing := sorted(set(trained) - set(saved)):
        raise CheckpointError(f"{source} is of another model: it lacks {shorten(missing)}")
    for name, shape in trained.items():
        if list(saved[name]) != shape:
            raise CheckpointError(
                f"{source} is of another model: {name} is {list(saved[name])} there, and {shape} here"
            )
