"""The table of combinations: each rule refuses its combination, and the page of the docs is the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from collie_core.config.rules import RULES, compatibility_page, require_fusable, require_parts
from collie_core.config.run import RunConfig
from collie_core.errors import ConfigError

ROOT = Path(__file__).parents[3]
LLAMA = {"config": {"model_type": "llama"}}
FULL: dict[str, Any] = {"model": {"model_name_or_path": "m"}, "data": {"train": "t", "eval": "e"}}

# key of the rule, and what an optimizer must declare for it -> sections that break it and no other rule
BREAKS: dict[str, dict[str, Any]] = {
    "model.model_name_or_path": {"model": {}},
    "parallel.sequence_parallel": {"parallel": {"sequence_parallel": True}},
    "parallel.pipeline_cuts": {"parallel": {"pipeline_parallel_size": 2, "pipeline_cuts": [1, 1, 1]}},
    "parallel.zero_stage": {"parallel": {"pipeline_parallel_size": 2, "zero_stage": 3}},
    "parallel.offload_optimizer": {"parallel": {"offload_optimizer": True}},
    "parallel.offload_param": {"parallel": {"zero_stage": 2, "offload_param": True}},
    "deepspeed": {"deepspeed": {"a": 1}},
    "model.quantization": {"model": {"model_name_or_path": "m", "quantization": "nf4"}},
    "parallel": {
        "model": {"model_name_or_path": "m", "quantization": "int8"},
        "parallel": {"zero_stage": 3},
        "adapter": {"type": "special"},
    },
    "model.config": {"model": {**LLAMA, "model_name_or_path": "m"}},
    "model.resize_vocabulary": {"model": {**LLAMA, "resize_vocabulary": {"size": 9}}, "tokenizer": "byte"},
    "model.config.model_type": {"model": {"config": {}}, "tokenizer": "byte"},
    "tokenizer.name_or_path": {"tokenizer": {"type": "byte", "name_or_path": "x"}},
    "tokenizer": {"model": LLAMA},
    "data.train": {"data": {"eval": "e"}},
    "evaluation.steps": {"data": {"train": "t"}, "evaluation": {"steps": 1}},
    "evaluation.epochs": {"data": {"train": "t"}, "evaluation": {"epochs": 1}},
    "evaluation.on_start": {"data": {"train": "t"}, "evaluation": {"on_start": True}},
    "report_to": {"report_to": ["csv", "csv"]},
    "evaluation.best": {"data": {"train": "t"}, "evaluation": {"best": {"metric": "eval/loss", "mode": "min"}}},
    "evaluation.best.min_delta": {"evaluation": {"best": {"metric": "eval/loss", "mode": "min", "min_delta": 1}}},
    "train.on_nan": {"train": {"on_nan": "rewind"}},
    "train.spike_factor": {"train": {"spike_factor": 3.0}, "parallel": {"zero_stage": 1}},
    "train.spike_factor fuses_backward": {"train": {"spike_factor": 3.0}},
    "train.max_steps": {"train": {"max_steps": 1, "num_train_epochs": 1}},
    "lr_scheduler.warmup_ratio": {"lr_scheduler": {"warmup_ratio": 0.1, "warmup_steps": 1}},
    "train.gradient_accumulation_steps fuses_backward": {"train": {"gradient_accumulation_steps": 2}},
    "parallel.pipeline_parallel_size fuses_backward": {"parallel": {"pipeline_parallel_size": 2}},
    "parallel.zero_stage fuses_backward": {"parallel": {"zero_stage": 2}},
    "parallel.offload_optimizer fuses_backward": {"parallel": {"zero_stage": 3, "offload_optimizer": True}},
    "parallel.zero_stage whole_tensors": {"parallel": {"zero_stage": 1}},
    "adapter.type": {"adapter": {"type": "special", "shy": True}},
    "adapter.adapter_name_or_path": {"adapter": {"type": "special", "adapter_name_or_path": "a", "shy": False}},
}
SPECIAL = """
from collie_core.api import Component, OptimizerCan
SPECIAL = Component(build="nowhere:Special", can=OptimizerCan({capability}=True))
"""
SHY = """
from typing import Literal
from collie_core.api import AdapterConfig, Component

class Config(AdapterConfig):
    type: Literal["special"] = "special"
    shy: bool = False

    def refused(self, config):
        return "it is shy" if self.shy and config.parallel.copy_size == 1 else ""

SPECIAL = Component(build="nowhere:Special", config="shy_pack:Config")
"""


def capability_of(rule: Any) -> str:
    """What the optimizer of the rule declares, by the words of the table."""
    words = {"updates in backward": "fuses_backward", "works on whole matrices": "whole_tensors"}
    return next((capability for text, capability in words.items() if text in rule.what), "")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.key)
def test_each_rule_refuses_its_combination_alone(rule: Any, tmp_path: Path, install: Any) -> None:
    capability = capability_of(rule)
    key = f"{rule.key} {capability}".strip()
    if key not in BREAKS:
        # these need a plugin: see test_components, and the tests of collie_peft and collie_server
        assert rule.key in ("evaluation.evaluators", "adapter", "server.compare")
        return
    sections = {**FULL, **BREAKS[key]}
    if capability:
        files = {"special_pack.py": SPECIAL.format(capability=capability)}
        install("collie-special", groups={"collie.optimizer": {"special": "special_pack:SPECIAL"}}, files=files)
        sections["optimizer"] = {"type": "special", "lr": 1.0}
    if "adapter" in sections:
        groups = {"collie.adapter": {"special": "shy_pack:SPECIAL"}}
        install("collie-shy", groups=groups, files={"shy_pack.py": SHY})
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(sections))
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_yaml(path, complete=True)
    (problem,) = caught.value.problems
    why = "it is shy" if rule.key == "adapter.type" else rule.why
    assert (problem.key, problem.rule, problem.hint) == (rule.key, why, rule.fix)
    assert problem.origin.startswith(str(path))
    if rule.part:
        RunConfig(**sections)  # a program may still hand it in


def test_what_is_not_refused_is_taken() -> None:
    RunConfig(**FULL, train={"max_steps": 1}, lr_scheduler={"warmup_steps": 0, "type": "linear"})
    RunConfig(**FULL, parallel={"zero_stage": 3}, deepspeed={"a": 1})
    RunConfig(**{**FULL, "model": LLAMA}, tokenizer={"name_or_path": "x"})


def test_what_a_program_hands_in_is_asked_too() -> None:
    require_fusable(RunConfig(**FULL, train={"global_batch_size": 4, "per_device_train_batch_size": 2}), 2)
    with pytest.raises(ConfigError, match=r"train\.gradient_accumulation_steps: it uses a gradient at once"):
        require_fusable(RunConfig(**FULL, train={"global_batch_size": 4, "per_device_train_batch_size": 2}), 1)
    with pytest.raises(ConfigError) as caught:
        require_fusable(RunConfig(**FULL, parallel={"pipeline_parallel_size": 2, "zero_stage": 1}), 1)
    assert [problem.key for problem in caught.value.problems] == [
        "parallel.pipeline_parallel_size",
        "parallel.zero_stage",
    ]


def test_parts_that_neither_the_file_nor_the_program_gives() -> None:
    require_parts(RunConfig(**FULL), model=False, train_data=False)
    require_parts(RunConfig(), model=True, train_data=True)
    with pytest.raises(ConfigError, match=r"^data\.train: is required\. Set it to a file or a hub id\.$"):
        require_parts(RunConfig(), model=True, train_data=False)
    with pytest.raises(ConfigError) as caught:
        require_parts(RunConfig(), model=False, train_data=False)
    assert [problem.key for problem in caught.value.problems] == ["model.model_name_or_path", "data.train"]


def test_the_page_of_the_docs_is_the_table() -> None:
    page = ROOT / "docs" / "compatibility.md"
    assert page.read_text(encoding="utf-8") == compatibility_page()
