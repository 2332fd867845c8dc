from __future__ import annotations

import subprocess
import sys
from importlib import import_module, metadata

import pytest
from transformers import LlamaConfig

import collie_llama
from collie_core.api import Component, StockFamily
from collie_llama.family import LLAMA

NAMES = ["llama", "mistral", "qwen2", "qwen3"]


@pytest.mark.parametrize("name", NAMES)
def test_component_points_at_the_family(name: str) -> None:
    component = getattr(collie_llama, name.upper())
    assert isinstance(component, Component)
    assert (component.build, component.config) == (f"collie_llama.family:{name.upper()}", "")
    assert getattr(import_module("collie_llama.family"), name.upper()) == StockFamily(name)
    points = metadata.distribution("collie-llama").entry_points.select(group="collie.model", name=name)
    assert [point.value for point in points] == [f"collie_llama:{name.upper()}"]


def test_config_is_the_one_of_transformers() -> None:
    config = LLAMA.make_config({"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 3})
    assert isinstance(config, LlamaConfig)
    assert (config.hidden_size, config.num_hidden_layers) == (32, 3)


@pytest.mark.parametrize("module", ["torch", "transformers", "pydantic"])
def test_the_description_is_light(module: str) -> None:
    code = f"import sys, collie_llama; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
