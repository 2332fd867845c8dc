"""The `optimizer: {type: lion}` section and the component behind it."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from collie_core.api import Component, OptimizerCan
from collie_optim import LION
from collie_optim.lion import Lion
from collie_optim.lion_config import LionConfig


def target(reference: str) -> Any:
    module, _, attribute = reference.partition(":")
    return getattr(import_module(module), attribute)


def test_component_points_at_what_exists() -> None:
    assert isinstance(LION, Component)
    assert target(LION.build) is Lion
    assert target(LION.config) is LionConfig
    assert LION.can == OptimizerCan(state_bytes_per_parameter=4.0)


def test_defaults_are_those_of_the_paper() -> None:
    assert LionConfig().model_dump() == {
        "type": "lion",
        "lr": 1e-4,
        "weight_decay": 0.0,
        "betas": (0.9, 0.99),
    }


def test_fields_are_exactly_the_options_of_the_optimizer() -> None:
    config = LionConfig.model_validate({"type": "lion", "lr": 2e-4, "weight_decay": 1, "betas": [0.95, 0.98]})
    optimizer = Lion([{"params": [torch.zeros(1)]}], **config.model_dump(exclude={"type"}))
    assert {key: optimizer.param_groups[0][key] for key in ("lr", "weight_decay", "betas")} == {
        "lr": 2e-4,
        "weight_decay": 1.0,
        "betas": (0.95, 0.98),
    }


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lr", 0),
        ("lr", -1e-4),
        ("lr", float("nan")),
        ("weight_decay", -0.1),
        ("betas", [0.9]),
        ("betas", [0.9, 1.0]),
        ("betas", [-0.1, 0.9]),
        ("beta1", 0.9),
        ("type", "lino"),
    ],
)
def test_wrong_values_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValidationError) as caught:
        LionConfig.model_validate({field: value})
    assert {error["loc"][0] for error in caught.value.errors()} == {field}


def test_the_description_needs_no_torch() -> None:
    code = "import sys, collie_optim, collie_optim.lion_config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
