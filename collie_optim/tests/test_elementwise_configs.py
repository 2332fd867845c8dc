"""The sections `optimizer: {type: lion | adan | sophia}` and the components behind them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from collie_core.api import Component, CurvatureOptimizer, OptimizerCan
from collie_optim import ADAN, LION, SOPHIA
from collie_optim.adan import Adan
from collie_optim.adan_config import AdanConfig
from collie_optim.lion import Lion
from collie_optim.lion_config import LionConfig
from collie_optim.sophia import Sophia
from collie_optim.sophia_config import SophiaConfig

CASES = [
    (LION, Lion, LionConfig, OptimizerCan(state_bytes_per_parameter=4.0)),
    (ADAN, Adan, AdanConfig, OptimizerCan(state_bytes_per_parameter=16.0)),
    (SOPHIA, Sophia, SophiaConfig, OptimizerCan(state_bytes_per_parameter=8.0, estimates_curvature=True)),
]
COMMON = {"param_groups": [], "kernel": "auto"}
CHOICES: dict[type[Any], dict[str, Any]] = {
    LionConfig: {"lr": 2e-4, "weight_decay": 1.0, "betas": (0.95, 0.98), "kernel": "eager"},
    AdanConfig: {
        "lr": 2e-4,
        "weight_decay": 1.0,
        "betas": (0.9, 0.8, 0.95),
        "eps": 1e-6,
        "proximal": False,
        "variant": "paper",
        "restart_steps": 100,
        "kernel": "compiled",
    },
    SophiaConfig: {
        "lr": 2e-4,
        "weight_decay": 1.0,
        "betas": (0.9, 0.95),
        "rho": 0.1,
        "eps": 1e-10,
        "hessian_interval": 3,
        "kernel": "eager",
    },
}


def target(reference: str) -> Any:
    module, _, attribute = reference.partition(":")
    return getattr(import_module(module), attribute)


@pytest.mark.parametrize(("component", "optimizer", "config", "can"), CASES)
def test_component_points_at_what_exists(
    component: Component, optimizer: type[Any], config: type[Any], can: OptimizerCan
) -> None:
    assert target(component.build) is optimizer
    assert target(component.config) is config
    assert component.can == can
    assert issubclass(optimizer, CurvatureOptimizer) == can.estimates_curvature


@pytest.mark.parametrize(
    ("config", "defaults"),
    [
        (LionConfig, {"type": "lion", "lr": 1e-4, "weight_decay": 0.0, "betas": (0.9, 0.99)}),
        (
            AdanConfig,
            {
                "type": "adan",
                "lr": 1e-3,
                "weight_decay": 0.02,
                "betas": (0.98, 0.92, 0.99),
                "eps": 1e-8,
                "proximal": True,
                "variant": "authors",
                "restart_steps": None,
            },
        ),
        (
            SophiaConfig,
            {
                "type": "sophia",
                "lr": 1e-4,
                "weight_decay": 0.2,
                "betas": (0.96, 0.99),
                "rho": 0.05,
                "eps": 1e-12,
                "hessian_interval": 10,
            },
        ),
    ],
)
def test_defaults_are_those_of_the_papers(config: type[Any], defaults: dict[str, Any]) -> None:
    assert config().model_dump() == defaults | COMMON


@pytest.mark.parametrize(("_component", "optimizer", "config", "_can"), CASES)
def test_fields_are_exactly_the_options_of_the_optimizer(
    _component: Component, optimizer: type[Any], config: type[Any], _can: OptimizerCan
) -> None:
    chosen = CHOICES[config]
    section = config.model_validate(chosen)
    assert set(chosen) == set(config.model_fields) - config.for_the_core  # every field is tried
    built = optimizer([{"params": [torch.zeros(1)]}], **section.model_dump(exclude=config.for_the_core))
    found = built.param_groups[0] | {"kernel": built.kernel}
    assert {name: found[name] for name in chosen} == chosen


@pytest.mark.parametrize(("_component", "optimizer", "config", "_can"), CASES)
def test_defaults_of_section_and_optimizer_agree(
    _component: Component, optimizer: type[Any], config: type[Any], _can: OptimizerCan
) -> None:
    built = optimizer([{"params": [torch.zeros(1)]}])
    found = built.param_groups[0] | {"kernel": built.kernel}
    defaults = config().model_dump(exclude=config.for_the_core)
    assert {name: found[name] for name in defaults} == defaults


@pytest.mark.parametrize("config", [LionConfig, AdanConfig, SophiaConfig])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lr", 0),
        ("lr", -1e-4),
        ("lr", float("nan")),
        ("weight_decay", -0.1),
        ("betas", [0.9]),
        ("betas", [0.9, 1.0, 0.9]),
        ("betas", [-0.1, 0.9]),
        ("beta1", 0.9),
        ("kernel", "triton"),
        ("type", "lino"),
    ],
)
def test_wrong_values_are_refused_by_name(config: type[Any], field: str, value: object) -> None:
    with pytest.raises(ValidationError) as caught:
        config.model_validate({field: value})
    assert {error["loc"][0] for error in caught.value.errors()} == {field}


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (AdanConfig, "eps", 0),
        (AdanConfig, "variant", "mine"),
        (AdanConfig, "restart_steps", 0),
        (SophiaConfig, "rho", 0),
        (SophiaConfig, "eps", 0),
        (SophiaConfig, "hessian_interval", 0),
    ],
)
def test_wrong_values_of_own_fields_are_refused(config: type[Any], field: str, value: object) -> None:
    with pytest.raises(ValidationError) as caught:
        config.model_validate({field: value})
    assert {error["loc"][0] for error in caught.value.errors()} == {field}
