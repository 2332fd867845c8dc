"""The JSON Schema: takes what the loader takes, refuses typos, knows every installed plugin."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from collie_core.cli import main
from collie_core.config.loading import read_file, read_text
from collie_core.config.run import RunConfig
from collie_core.config.schema import json_schema
from collie_core.plugins import Plugins

ROOT = Path(__file__).parents[3]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
GOOD = "model: {model_name_or_path: m}\ndata: {train: t.jsonl}\n"


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return json_schema(Plugins.discover())


def _valid(schema: dict[str, Any], text: str) -> bool:
    return jsonschema.Draft202012Validator(schema).is_valid(read_text(text, "x").data)


def test_it_is_a_schema_of_draft_2020_12(schema: dict[str, Any]) -> None:
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    jsonschema.Draft202012Validator.check_schema(schema)
    assert "x-collie" not in json.dumps(schema)


def _plugins_of(example: dict[str, Any]) -> list[tuple[str, str]]:
    """Kinds and names of what other packs may bring."""
    metrics = [
        metric
        for evaluator in example.get("evaluation", {}).get("evaluators", [])
        for metric in evaluator.get("metrics", [])
    ]
    names = [("metric", metric if isinstance(metric, str) else metric["type"]) for metric in metrics]
    return [*names, *(("adapter", section["type"]) for section in [example.get("adapter")] if section)]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_fit(schema: dict[str, Any], path: Path) -> None:
    example = read_file(path).data
    registry = Plugins.discover()
    for kind, name in _plugins_of(example):
        if name not in registry.names(kind):
            pytest.skip(f"the pack of the {kind} {name} is not installed")
    jsonschema.Draft202012Validator(schema).validate(example)


def test_what_is_written_out_fits(schema: dict[str, Any]) -> None:
    text = RunConfig.from_text(GOOD).to_yaml()
    data = {key: value for key, value in read_text(text, "x").data.items() if value is not None}
    jsonschema.Draft202012Validator(schema).validate(data)


@pytest.mark.parametrize(
    "line",
    [
        "data: {train: [a, {path: b, weight: 2}]}",
        "tokenizer: byte",
        "lr_scheduler: cosine",
        "optimizer: sgd",
        "optimizer: {lr: 1.0e-3}",
        "optimizer: {type: sgd, momentum: 0.9}",
        "optimizer: {type: 'collie-core:adamw', betas: [0.9, 0.95]}",
        "parallel: {data_parallel_size: auto, zero_stage: 2}",
        "evaluation: {evaluators: [perplexity, {type: perplexity}]}",
        "report_to: tensorboard",
        "report_to: none",
        "report_to: {type: wandb, project: p}",
        "report_to: [csv, {type: mlflow, experiment: e}]",
        "evaluation: {best: {metric: eval/loss, mode: min, patience: 3}}",
        "train: {monitors: [host, disk, network]}",
        "model: {gradient_checkpointing: true, config: {a: {b: 1}}}",
        "deepspeed: {anything: [1]}",
    ],
)
def test_what_the_loader_takes_fits(schema: dict[str, Any], line: str) -> None:
    assert _valid(schema, line)


@pytest.mark.parametrize(
    "line",
    [
        "trian: {}",
        "train: {max_step: 1}",
        "train: {max_steps: 0}",
        "train: {max_steps: ten}",
        "train: {max_steps: true}",
        "optimizer: {type: adamw, momentum: 0.9}",
        "optimizer: {momentum: 0.9}",
        "optimizer: adamv",
        "optimizer: {type: nothing}",
        "data: {train: [{pth: b}]}",
        "evaluation: {evaluators: [{type: perplexity, x: 1}]}",
        "evaluation: {best: {mode: min}}",
        "report_to: nowhere",
        "train: {monitors: [hosts]}",
    ],
)
def test_what_the_loader_refuses_does_not_fit(schema: dict[str, Any], line: str) -> None:
    assert not _valid(schema, line)


def test_fields_are_described(schema: dict[str, Any]) -> None:
    train = schema["$defs"]["TrainConfig"]["properties"]
    assert train["max_steps"]["description"] == "Optimizer steps; instead of num_train_epochs."
    adamw = schema["$defs"]["optimizer.collie-core.adamw"]["properties"]
    assert "description" in adamw["betas"]
    assert adamw["type"]["enum"] == ["adamw", "collie-core:adamw"]


def test_an_installed_plugin_has_its_section_and_a_broken_one_has_none(install: Any) -> None:
    code = """
        from typing import Any, Callable, Literal
        from pydantic import Field
        from collie_core.api import Component, ComponentConfig, ConfigModel, OptimizerConfig

        class AdamWConfig(ConfigModel):  # the name of a model of the core
            depth: int = Field(description="How deep.")

        class SwiftConfig(OptimizerConfig):
            type: Literal["swift"]
            lr: float = 1.0
            inner: AdamWConfig

        class OddConfig(OptimizerConfig):
            type: Literal["odd"] = "odd"
            lr: float = 1.0
            call: Callable[[int], int] = Field(default=abs)

        SWIFT = Component(build="x:y", config="packed:SwiftConfig", summary="quick")
        PLAIN = Component(build="x:y", summary="plain")
        ODD = Component(build="x:y", config="packed:OddConfig")
    """
    optimizers = {"swift": "packed:SWIFT", "odd": "packed:ODD", "gone": "packed:GONE"}
    groups = {"collie.optimizer": optimizers, "collie.adapter": {"plain": "packed:PLAIN"}}
    install("collie-packed", groups=groups, files={"packed.py": textwrap.dedent(code)})
    schema = json_schema(Plugins.discover())
    jsonschema.Draft202012Validator.check_schema(schema)
    assert _valid(schema, "optimizer: {type: swift, inner: {depth: 3}}")
    assert not _valid(schema, "optimizer: {type: swift, inner: {depht: 3}}")
    assert _valid(schema, "optimizer: {type: adamw, betas: [0.9, 0.99]}")
    assert _valid(schema, "adapter: plain")
    assert _valid(schema, "adapter: {type: plain}")
    assert not _valid(schema, "optimizer: odd")
    assert not _valid(schema, "optimizer: gone")


def test_an_ambiguous_name_is_offered_in_full_only(install: Any) -> None:
    groups = {"collie.adapter": {"twin": "packed:PLAIN"}}
    files = {"packed.py": "from collie_core.api import Component\nPLAIN = Component(build='x:y')"}
    install("collie-one", groups=groups, files=files)
    install("collie-two", groups=groups, files=files)
    schema = json_schema(Plugins.discover())
    assert not _valid(schema, "adapter: twin")
    assert _valid(schema, "adapter: collie-two:twin")
    assert _valid(schema, "adapter: {type: 'collie-one:twin'}")


def test_the_verb_prints_or_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert main(["schema", "-o", str(tmp_path / "s.json")]) == 0
    assert json.loads((tmp_path / "s.json").read_text()) == printed
    assert "yaml-language-server: $schema=s.json" in capsys.readouterr().out
    assert main(["schema", "-o", str(tmp_path / "no" / "s.json")]) == 1
    assert "cannot write" in capsys.readouterr().err
