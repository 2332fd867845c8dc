"""Sizes that a model cannot be cut into are refused before torch is imported, with those that would work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from collie_core.config.run import RunConfig
from collie_core.config.split import allowed_tensor_sizes
from collie_core.errors import ConfigError

CONFIG = {"model_type": "llama", "num_attention_heads": 12, "num_key_value_heads": 4, "num_hidden_layers": 6}


def problems_of(parallel: dict[str, Any], **model: Any) -> list[tuple[str, str]]:
    sections: dict[str, Any] = {"model": model or {"config": CONFIG}, "tokenizer": "byte", "parallel": parallel}
    with pytest.raises(ConfigError) as caught:
        RunConfig(**sections)
    return [(problem.key, str(problem)) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("parallel", "key", "words"),
    [
        ({"tensor_parallel_size": 5}, "parallel.tensor_parallel_size", "sizes that can: 1, 2, 4, 12"),
        ({"pipeline_parallel_size": 7}, "parallel.pipeline_parallel_size", "exceeds the 6 layers of the model"),
        (
            {"pipeline_parallel_size": 2, "pipeline_cuts": [3, 2]},
            "parallel.pipeline_cuts",
            "must add up to the 6 layers of the model",
        ),
    ],
)
def test_impossible_sizes_are_refused_with_those_that_work(parallel: dict[str, Any], key: str, words: str) -> None:
    ((found, sentence),) = problems_of(parallel)
    assert found == key
    assert words in sentence


def test_the_sizes_are_read_from_the_model_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"n_head": 4, "n_layer": 2}))
    found = problems_of({"tensor_parallel_size": 3, "pipeline_parallel_size": 3}, model_name_or_path=str(tmp_path))
    assert [key for key, _ in found] == ["parallel.tensor_parallel_size", "parallel.pipeline_parallel_size"]


@pytest.mark.parametrize("written", ["{", "[1]", '{"num_attention_heads": "many"}'])
def test_a_config_that_does_not_say_is_left_to_the_build(written: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(written)
    RunConfig(model={"model_name_or_path": str(tmp_path)}, parallel={"tensor_parallel_size": 3})


def test_sizes_share_heads_evenly_and_copy_key_value_heads_at_most() -> None:
    assert allowed_tensor_sizes(8, 4) == [1, 2, 4, 8]
    assert allowed_tensor_sizes(12, 4) == [1, 2, 4, 12]
    assert allowed_tensor_sizes(6, 6) == [1, 2, 3, 6]
    assert allowed_tensor_sizes(8, 1) == [1, 2, 4, 8]
