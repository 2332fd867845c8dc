"""Cells of the compatibility table: family x optimizer x adapter x topology. Each trains as one process does, or is
refused with its reason; there is no third state.

`make test` takes sixty cells, drawn with a seed, `make matrix` all of them.
"""

from __future__ import annotations

import os
import random
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from families import write_family
from runs import sections_on, train
from topologies import FAMILIES, OPTIMIZERS, world_size_of

from collie_core.api import CollieError
from collie_core.plugins import Plugins

STEPS, BATCH, SAMPLE = 3, 4, 60
LINEAR = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
ADAPTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "lora": {"type": "lora", "r": 4, **LINEAR},
    "dora": {"type": "lora", "r": 4, "use_dora": True, **LINEAR},
    "adalora": {"type": "adalora", "init_r": 6, "target_r": 4, "tinit": 1, "tfinal": 1, **LINEAR},
    "ia3": {"type": "ia3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "prompt_tuning": {"type": "prompt_tuning", "num_virtual_tokens": 5},
    "p_tuning": {"type": "p_tuning", "num_virtual_tokens": 5, "encoder_hidden_size": 32},
    "prefix_tuning": {"type": "prefix_tuning", "num_virtual_tokens": 5},
    "llama_adapter": {"type": "llama_adapter", "adapter_len": 4, "adapter_layers": 3},
    "bottleneck": {"type": "bottleneck"},
}
TOPOLOGIES = ["dp2", "tp2", "pp2", "tp4", "tp2dp2", "tp2pp2", "dp2zero1", "dp2zero2", "dp2zero3"]


class Cell(NamedTuple):
    """One combination, on a topology that the test names."""

    family: str
    optimizer: str
    adapter: str


ALL = [Cell(*names) for names in product(FAMILIES, OPTIMIZERS, ADAPTERS)]


def drawn(topology: str) -> list[Cell]:
    """Its share of the sample, or all of its cells."""
    if "COLLIE_MATRIX" in os.environ:
        return ALL
    sample = random.Random(7).sample(list(product(TOPOLOGIES, ALL)), SAMPLE)
    return [cell for place, cell in sample if place == topology]


Result = list[float] | str
"""Losses, or why it was refused."""


def train_cells(topology: str, cells: list[Cell], models: Path, data: Path, output: Path) -> list[Result]:
    """What this rank finds in each cell."""
    return [train_cell(topology, cell, models / cell.family, data, output) for cell in cells]


def train_cell(topology: str, cell: Cell, model: Path, data: Path, output: Path) -> Result:
    sections = sections_on(topology, model, data, output, steps=STEPS, micro_batch=BATCH)
    sections["data"] |= {"max_length": 64}
    sections["optimizer"] = {"type": cell.optimizer, **OPTIMIZERS[cell.optimizer]}
    if ADAPTERS[cell.adapter]:
        sections["adapter"] = ADAPTERS[cell.adapter]
    try:
        return train(sections).losses
    except CollieError as error:
        return str(error)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model of every family."""
    folder = tmp_path_factory.mktemp("matrix")
    for name in FAMILIES:
        write_family(folder / name, name)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(100 if "COLLIE_MATRIX" not in os.environ else 7200)
@pytest.mark.filterwarnings("ignore")  # DeepSpeed calls collectives that torch deprecates
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_cell_trains_as_one_process_does_or_is_refused(
    topology: str, zygote: Any, models: Path, instructions: Path, tmp_path: Path
) -> None:
    cells = drawn(topology)

    def on(place: str) -> list[list[Result]]:
        arguments = (place, cells, models, instructions, tmp_path / place)
        ranks = zygote.run(
            __file__, "train_cells", world_size=world_size_of(place), args=arguments, limit_s=10.0 * len(cells) + 60
        )
        return list(zip(*ranks, strict=True))

    for cell, alone, ranks in zip(cells, on("dp1"), on(topology), strict=True):
        expected, found = alone[0], ranks[0]
        assert all(other == found for other in ranks), (cell, ranks)
        if isinstance(found, str):
            assert len(found.split()) > 4, (cell, found)
            continue
        assert not isinstance(expected, str), (cell, f"one process is refused, and {topology} trains: {expected}")
        assert len(found) == STEPS
        worst = max(abs(one - other) for one, other in zip(found, expected, strict=True))
        assert worst <= 2e-5 * max(1.0, *expected), (cell, found, expected)


def test_the_table_has_every_optimizer_adapter_and_family() -> None:
    """Of the packs in this repository: a new one must be put into the table."""
    registry = Plugins.discover()
    assert {*registry.names("optimizer")} == {*OPTIMIZERS}
    assert {*registry.names("adapter")} == {
        section["type"].replace("_", "-") for section in ADAPTERS.values() if section
    }
