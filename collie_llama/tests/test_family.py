"""The llama family says nothing beyond its name."""

from __future__ import annotations

import subprocess
import sys

import pytest
from transformers import LlamaConfig

from collie_core.api import Component
from collie_llama import LLAMA
from collie_llama.family import FAMILY


def test_component_points_at_the_family() -> None:
    assert isinstance(LLAMA, Component)
    assert LLAMA.build == "collie_llama.family:FAMILY"
    assert LLAMA.config == ""
    assert FAMILY.model_type == "llama"


def test_config_is_the_one_of_transformers() -> None:
    config = FAMILY.make_config({"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 3})
    assert isinstance(config, LlamaConfig)
    assert (config.hidden_size, config.num_hidden_layers) == (32, 3)


@pytest.mark.parametrize("module", ["torch", "transformers", "pydantic"])
def test_the_description_is_light(module: str) -> None:
    code = f"import sys, collie_llama; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
