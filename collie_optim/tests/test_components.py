"""What every optimizer of the pack promises as a plugin."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

import collie_optim
from collie_core.api import Component, CurvatureOptimizer, FusedOptimizer, OptimizerConfig

COMPONENTS: dict[str, Component] = {name.lower(): getattr(collie_optim, name) for name in collie_optim.__all__}
every = pytest.mark.parametrize("name", COMPONENTS)


def target(reference: str) -> Any:
    module, _, attribute = reference.partition(":")
    return getattr(import_module(module), attribute)


def built(name: str) -> torch.optim.Optimizer:
    """With the options of the section, as a run builds it."""
    component = COMPONENTS[name]
    config = target(component.config)()
    options = config.model_dump(exclude=set(config.for_the_core))
    optimizer: torch.optim.Optimizer = target(component.build)(
        [{"params": [nn.Parameter(torch.ones(3, 2))]}], **options
    )
    return optimizer


def test_the_entry_points_are_the_components() -> None:
    found = {entry.name: entry for entry in entry_points(group="collie.optimizer") if entry.module == "collie_optim"}
    assert {name: entry.load() for name, entry in found.items()} == COMPONENTS


@every
def test_the_section_is_that_of_the_optimizer(name: str) -> None:
    config = target(COMPONENTS[name].config)
    assert issubclass(config, OptimizerConfig)
    assert config().type == name
    assert all(field.description for key, field in config.model_fields.items() if key != "type")
    defaults = config().model_dump(exclude={*config.for_the_core, "kernel", "adamw_lr", "adamw_betas", "adamw_eps"})
    alone = target(COMPONENTS[name].build)([nn.Parameter(torch.ones(3, 2))])
    assert {key: alone.param_groups[0][key] for key in defaults} == defaults
    assert {key: built(name).param_groups[0][key] for key in defaults} == defaults


@every
@pytest.mark.parametrize(
    ("field", "value"), [("lr", 0), ("lr", float("nan")), ("weight_decay", -0.1), ("zzz", 1), ("type", "zzz")]
)
def test_wrong_values_are_refused_by_name(name: str, field: str, value: object) -> None:
    with pytest.raises(ValidationError) as caught:
        target(COMPONENTS[name].config).model_validate({field: value})
    assert {error["loc"][0] for error in caught.value.errors()} == {field}


@every
def test_it_is_what_it_declares(name: str) -> None:
    optimizer, can = built(name), COMPONENTS[name].can
    assert isinstance(optimizer, FusedOptimizer) == can.fuses_backward  # type: ignore[attr-defined]
    assert isinstance(optimizer, CurvatureOptimizer) == can.estimates_curvature  # type: ignore[attr-defined]


@every
def test_states_are_as_large_as_declared(name: str) -> None:
    param = nn.Parameter(torch.ones(512, 1376))
    param.grad = torch.ones_like(param)
    optimizer = target(COMPONENTS[name].build)([param])
    optimizer.step()
    held = sum(value.nbytes for value in optimizer.state[param].values() if value.ndim)
    assert held <= COMPONENTS[name].can.state_bytes_per_parameter * param.numel()  # type: ignore[attr-defined]


def test_the_descriptions_need_no_torch() -> None:
    modules = sorted(component.config.partition(":")[0] for component in COMPONENTS.values())
    code = f"import sys, collie_optim, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
