"""The families in `plugins/` train on every topology as plain torch does, and are saved in the layout of their files.

What another topology or family, or the checks of `test_kit.py`, have shown already is left to `make everything`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from combos import more
from families import PACKS, pack_reference, read_tensors, write_pack
from plain import PlainRun
from runs import largest_difference
from topologies import world_size_of

TRAIN = str(Path(__file__).with_name("test_topologies.py"))
STEPS, BATCH = 8, 8
ALL = list(PACKS)

Trained = tuple[PlainRun, dict[str, torch.Tensor]]
"""What came out of a run, and the weights at its end."""


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random checkpoint of each family."""
    folder = tmp_path_factory.mktemp("packs")
    for name in PACKS:
        write_pack(folder / name, name)
    return folder


@pytest.fixture(scope="module")
def plain(families: Path, instructions: Path) -> Callable[[str], Trained]:
    """The same training in plain torch, of the families that are asked for."""

    @functools.cache
    def trained(name: str) -> Trained:
        model = pack_reference(families / name, name)
        return PlainRun(steps=STEPS, batch=BATCH).train(model, families / name, instructions), model.state_dict()

    return trained


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # DeepSpeed calls collectives that torch deprecates
@pytest.mark.parametrize(
    ("topology", "names", "changes"),
    [
        ("tp2pp2", ["gemma2", "qwen3_moe", "chatglm", "moss"], {"data.packing": True}),
        more("dp1", ALL, {}),
        more("tp2", ALL, {}),
        more("tp2", ALL, {"parallel.sequence_parallel": True}),
        more("tp4", ALL, {}),
        more("pp2", ALL, {}),
        more("tp2pp2", ALL, {}),
        more("tp2pp2", ALL, {"data.packing": True}),
        more("dp2zero3", ALL, {}),
        more("tp2dp2zero3", ALL, {}),
    ],
)
def test_a_topology_trains_a_pack_as_plain_torch_does(
    topology: str,
    names: list[str],
    changes: Any,
    zygote: Any,
    families: Path,
    plain: Callable[[str], Trained],
    instructions: Path,
    tmp_path: Path,
) -> None:
    args = (topology, families, instructions, tmp_path, names, changes)
    ranks = zygote.run(TRAIN, "train_all", world_size=world_size_of(topology), args=args, limit_s=400)
    for name in names:
        expected, weights = plain(name)
        losses, norms = ranks[0][name]
        assert all(rank[name][0] == losses for rank in ranks), f"{name}: ranks report different losses"
        assert losses[-1] < losses[0]
        assert largest_difference(losses, expected.losses) <= 1e-5, name
        assert largest_difference(norms, expected.norms) <= 1e-5 * max(1.0, *expected.norms), name
        saved = tmp_path / name / "run" / "model"
        assert read_tensors(saved).keys() == read_tensors(families / name).keys()
        for key, value in pack_reference(saved, name).state_dict().items():
            assert (value - weights[key]).norm() <= 1e-4 * weights[key].norm(), f"{name}: {key}"
