"""The components, and what their descriptions cost."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from itertools import pairwise

import pytest
from transformers import LlamaConfig

import collie_internlm
from collie_core.api import Component
from collie_internlm.family import INTERNLM, INTERNLM2, INTERNLM3


@pytest.mark.parametrize(
    ("name", "family"), [("internlm", INTERNLM), ("internlm2", INTERNLM2), ("internlm3", INTERNLM3)]
)
def test_component_points_at_the_family(name: str, family: object) -> None:
    component = getattr(collie_internlm, name.upper())
    assert isinstance(component, Component)
    assert component.build == f"collie_internlm.family:{name.upper()}"
    assert getattr(family, "model_type", "") == name
    points = metadata.distribution("collie-internlm").entry_points.select(group="collie.model", name=name)
    assert [point.value for point in points] == [f"collie_internlm:{name.upper()}"]


def test_their_configs_are_stock() -> None:
    assert type(INTERNLM.make_config({"model_type": "internlm", "hidden_size": 32})) is LlamaConfig
    assert type(INTERNLM2.make_config({"model_type": "internlm2", "hidden_size": 32})) is LlamaConfig


def test_that_of_internlm3_is_stock() -> None:
    from transformers import InternLM3Config

    assert type(INTERNLM3.make_config({"model_type": "internlm3", "hidden_size": 32})) is InternLM3Config


@pytest.mark.parametrize("module", ["torch", "transformers", "pydantic"])
def test_the_description_is_light(module: str) -> None:
    code = f"import sys, collie_internlm; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_rows_of_wqkv_are_each_taken_once() -> None:
    config = INTERNLM2.make_config({"hidden_size": 48, "num_attention_heads": 12, "num_key_value_heads": 3})
    taken = []
    for letter in "qkv":
        source = INTERNLM2.weights[f"model.layers.*.self_attn.{letter}_proj.weight"]
        assert source.key == "model.layers.*.attention.wqkv.weight"
        assert source.rows is not None
        taken += source.rows(config)
    assert taken[3:6] == [(16, 20), (40, 44), (64, 68)]  # keys: heads are 4 wide, 4 query heads stand before each
    edges = sorted(taken)
    assert edges[0][0] == 0
    assert edges[-1][1] == (12 + 2 * 3) * 4
    assert all(before[1] == after[0] for before, after in pairwise(edges))
