"""What this rank holds of a model, and where it comes from: a value that stands on the model itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from collie_core.hookspecs import ModelFamily
    from collie_core.model.boxes import Piece
    from collie_core.model.partition import Partition
    from collie_core.model.vocabulary_extension import VocabularyExtension
    from collie_core.topology import Topology


@dataclass(frozen=True)
class Part:
    """One rank's share of a model. `model.collie_part` holds it from the moment the model is built."""

    partition: Partition
    topology: Topology
    family: ModelFamily
    layout: Mapping[str, Sequence[Piece]]  # of the whole model: tensor -> where its values lie in the files
    raw_config: Mapping[str, Any]  # config.json, or `model.config`, as it was found
    vocabulary: VocabularyExtension | None = None  # rows that the files do not have


def part_of(model: nn.Module) -> Part | None:
    """What this rank holds of `model`, also inside an adapter's wrapper; None for a model that a program handed in."""
    part = getattr(model, "collie_part", None)
    return part if isinstance(part, Part) else None
