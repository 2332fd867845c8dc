"""What a tensor-parallel part says of its whole."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from sharded import start
from torch import nn

from collie_core.model.partition import Rule
from collie_core.model.whole import set_whole, whole_of

CASES: dict[str, tuple[tuple[int, ...], Rule]] = {
    "rows": ((7, 3), Rule(0, (7,))),
    "columns": ((3, 6), Rule(1, (6,))),
    "packed": ((10, 3), Rule(0, (6, 4))),
    "copies": ((2, 5), Rule(0, (2,), copies=2)),
    "vector": ((8,), Rule(0, (8,))),
}


def parts(name: str) -> dict[str, Any]:
    """What a rank finds out about a parameter that is cut by a rule."""
    axis = start().tp
    shape, rule = CASES[name]
    tensor = torch.arange(float(torch.Size(shape).numel())).view(shape)
    parameter = nn.Parameter(torch.empty(0))
    set_whole(parameter, rule, axis)
    whole = copy.deepcopy(whole_of(parameter))
    part = whole.take(tensor).contiguous()
    return {
        "part": tuple(part.shape),
        "shape": whole.shape(part),
        "numel": whole.numel(part),
        "sum": whole.sum(part.sum()).item(),
        "gathered": torch.equal(whole.gather(part), tensor),
        "counts": whole.counts,
    }


@pytest.mark.parametrize(("name", "ranks"), [(name, 4 if name == "copies" else 2) for name in CASES])
def test_statistics_of_the_whole(name: str, ranks: int, zygote: Any) -> None:
    shape, rule = CASES[name]
    entries = torch.Size(shape).numel()
    found = zygote.run(__file__, "parts", world_size=ranks, args=(name,))
    for rank in found:
        assert rank["shape"] == shape
        assert rank["numel"] == entries
        assert rank["sum"] == entries * (entries - 1) / 2  # every entry once, whatever ranks have copies
        assert rank["gathered"]
    assert sum(rank["counts"] for rank in found) == ranks // rule.copies
    assert all(rank["part"] != shape for rank in found)


def test_what_is_not_cut_is_its_own_whole() -> None:
    parameter = nn.Parameter(torch.ones(3, 2))
    whole = whole_of(parameter)
    assert whole.shape(parameter) == (3, 2)
    assert whole.sum(parameter).equal(parameter)
    assert whole.gather(parameter) is parameter
    assert whole.take(parameter) is parameter
