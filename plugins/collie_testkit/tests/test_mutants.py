"""Each check catches its mutant, and no check before it does: none is idle, and none is a copy of another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from collie_core.api import Plugins
from collie_testkit.context import Context, Material, Shared
from collie_testkit.registry import KINDS, Check, checks_of
from collie_testkit.results import FAILED, SKIPPED, checks_for, run_check
from collie_testkit.training import LLAMA


def momentum(weights: Tensor, grads: Sequence[Tensor], *, lr: float, weight_decay: float) -> Tensor:
    """What all optimizers among the mutants should do."""
    found = torch.zeros_like(weights)
    for grad in grads:
        found = 0.9 * found + grad
        weights = (1 - lr * weight_decay) * weights - lr * found
    return weights


HEADS = ("num_attention_heads", "num_key_value_heads")
SILENT = {key: value for key, value in LLAMA.items() if key not in ("model_type", *HEADS)} | {"hidden_size": 192}
"""A config.json that leaves its heads to llama's defaults, so that the family alone knows how many there are."""

MATERIAL: dict[str, dict[str, Any]] = {
    "takes-any-size": {"config": SILENT},
    "other-momentum": {"reference": momentum},
    "off-by-one": {"golden": (["a", "b"], ["a", "a"], {"match": 0.5})},
}
DESCRIBED: set[str] = set()  # kinds whose descriptions were found light
CASES = [
    pytest.param(
        kind, check, id=f"{kind}-{check.name}-{check.mutant}", marks=[pytest.mark.slow] if check.level > 1 else []
    )
    for kind in KINDS
    for check in checks_of(kind)
    if check.kinds or kind == "optimizer"  # the package is the same for all
]


@pytest.mark.usefixtures("mutants")
@pytest.mark.parametrize(("kind", "check"), CASES)
def test_a_mutant_is_caught_by_its_check_and_by_none_before(
    kind: str, check: Check, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if check.level == 3 and not torch.cuda.is_available():
        pytest.skip("torch.cuda.is_available() is False: the mutant can be caught on a GPU alone")
    if kind == "adapter":
        pytest.importorskip("peft", reason="the adapters among the mutants are peft's")
    plugins, material = Plugins.discover(), Material(**MATERIAL.get(check.mutant, {}))
    chosen = checks_for(plugins, kind, check.mutant)
    shared = Shared(tmp_path / "shared", together=False)  # what comes after the check is not looked at
    shared.folder.mkdir()
    for number, other in enumerate(chosen[: chosen.index(check) + 1]):
        if other.name == "light" and check.name != "light" and kind in DESCRIBED:
            continue  # it takes a process, and one module describes all of a kind
        folder = tmp_path / str(number)
        folder.mkdir()
        context = Context(
            kind, check.mutant, folder, lambda: request.getfixturevalue("zygote"), material, plugins, shared
        )
        result = run_check(other, context)
        if other is check and result.outcome == SKIPPED:
            pytest.skip(result.reason)  # no DeepSpeed
        if other is check:
            assert result.outcome == FAILED, result
            return
        assert result.outcome != FAILED, f"{other.name} catches it too: {result.reason}"
        if other.name == "light":
            DESCRIBED.add(kind)
        assert result.outcome != SKIPPED or result.reason


def test_every_check_says_what_it_demands_and_has_a_mutant_of_its_own() -> None:
    found = {check.name: check for kind in KINDS for check in checks_of(kind) for check in [check]}
    assert all(check.demand.endswith(".") for check in found.values())
    mutants = [check.mutant for kind in KINDS for check in checks_of(kind) if check.kinds or kind == "optimizer"]
    assert len(mutants) == len(set(mutants))
