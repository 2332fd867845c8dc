"""Sections of plugins: validated by the plugin's own model, found by any spelling of its name."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest

from collie_core.config.base import ComponentConfig, OptimizerConfig
from collie_core.config.run import RunConfig
from collie_core.errors import ConfigError
from collie_core.optimizers.configs import AdamWConfig

GOOD: dict[str, Any] = {"model": {"model_name_or_path": "m"}, "data": {"train": "t.jsonl"}}
CONFIG = """
    from typing import Literal
    from pydantic import Field
    from collie_core.api import Component, {base}, ConfigModel

    class Inner(ConfigModel):
        depth: int = Field(1, description="How deep.")

    class Config({base}):
        type: Literal["Ada_Swift"] = "Ada_Swift"
        lr: float = 0.5
        inner: Inner = Inner()
        layers: str | list[str] | None = None
        learning_rate_scale: float = 1.0

    SWIFT = Component(build="nowhere:Swift", config="swift_pack:Config", summary="quick")
"""


@pytest.fixture
def swift(install: Any) -> None:
    _install(install, "collie-swift")


def _install(install: Any, name: str, base: str = "OptimizerConfig", kind: str = "optimizer") -> None:
    files = {"swift_pack.py": textwrap.dedent(CONFIG.format(base=base))}
    install(name, groups={f"collie.{kind}": {"ada-swift": "swift_pack:SWIFT"}}, files=files)


def _config(**sections: Any) -> RunConfig:
    return RunConfig(**{**GOOD, **sections})


def _refused(**sections: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        _config(**sections)
    return str(caught.value)


@pytest.mark.usefixtures("swift")
@pytest.mark.parametrize("name", ["ada-swift", "Ada_Swift", "ADA.SWIFT", "collie-swift:ada-swift"])
def test_any_spelling_of_the_name(name: str) -> None:
    config = _config(optimizer={"type": name, "inner": {"depth": 3}})
    assert type(config.optimizer).__module__ == "swift_pack"
    assert config.optimizer.lr == 0.5
    assert config.registry.find("optimizer", config.optimizer.type).distribution == "collie-swift"
    assert RunConfig.from_text(config.to_yaml()) == config
    assert _config(optimizer=name) == _config(optimizer={"type": name})


@pytest.mark.usefixtures("swift")
def test_nested_errors_keep_their_dotted_path() -> None:
    message = _refused(optimizer={"type": "ada-swift", "inner": {"depht": 1}, "layers": {"a": 1}, "lr": True})
    assert "optimizer.inner.depht = 1: is not a known key. Did you mean depth?" in message
    assert "optimizer.layers = {'a': 1}: must be text or a list" in message
    assert "optimizer.lr = True: must be a number" in message


@pytest.mark.usefixtures("swift")
def test_a_section_made_in_python_is_taken_as_it_is() -> None:
    section = AdamWConfig(lr=1e-3)
    config = _config(optimizer=section)
    assert config.optimizer is section
    assert config == _config(optimizer={"type": "adamw", "lr": 1e-3})
    assert _config(optimizer=ComponentConfig(type="adamw")) == _config()
    assert _config(optimizer=OptimizerConfig(type="adamw", lr=1e-3)) == config  # by its type's own model


@pytest.mark.usefixtures("swift")
def test_aliases_give_way_to_the_fields_of_the_plugin(caplog: pytest.LogCaptureFixture) -> None:
    config = _config(optimizer={"type": "ada-swift", "learning_rate": 0.25, "learning_rate_scale": 2.0})
    assert config.optimizer.lr == 0.25
    assert caplog.messages == ["optimizer.learning_rate is called optimizer.lr here"]


def test_two_distributions_with_one_name(install: Any) -> None:
    _install(install, "collie-a")
    _install(install, "collie-b")
    assert "is given 2 times: collie-a:ada-swift" in _refused(optimizer="ada-swift")
    assert _config(optimizer="collie-b:ada-swift").optimizer.type == "collie-b:ada-swift"
    assert _config(optimizer="ada-swift", plugins={"block": ["collie-a"]}).registry.blocked


@pytest.mark.usefixtures("swift")
def test_the_block_list_of_the_file_comes_first() -> None:
    message = _refused(optimizer="ada-swift", plugins={"block": ["collie_swift"]})
    assert "optimizer = 'ada-swift'" in message
    assert "is blocked by" in message


def test_a_plugin_that_does_not_work(install: Any) -> None:
    files = {"bad_pack.py": "raise RuntimeError('no kernel')"}
    install("collie-bad", groups={"collie.optimizer": {"bad": "bad_pack:BAD"}}, files=files)
    _config()  # nobody asked for it
    message = _refused(optimizer={"type": "bad"})
    assert "optimizer.type = 'bad': collie-bad" in message
    assert "no kernel" in message
    assert "block it: COLLIE_BLOCK=collie-bad" in message


def test_an_optimizer_whose_config_has_no_learning_rate(install: Any) -> None:
    _install(install, "collie-swift", base="ComponentConfig")
    assert "must be a subclass of OptimizerConfig" in _refused(optimizer="ada-swift")


def test_an_adapter_needs_no_learning_rate(install: Any) -> None:
    _install(install, "collie-swift", base="AdapterConfig", kind="adapter")
    config = _config(adapter={"type": "ada-swift", "layers": ["a"]})
    assert config.adapter is not None
    assert config.adapter.model_dump()["layers"] == ["a"]
    assert RunConfig.from_text(config.to_yaml()) == config


def test_a_metric_that_reads_something_else_is_refused(install: Any) -> None:
    component = "from collie_core.api import Component, MetricCan\n"
    component += "NIST = Component(build='x:y', can=MetricCan(reads='texts'))"
    install("collie-nist", groups={"collie.metric": {"nist": "nist_pack:NIST"}}, files={"nist_pack.py": component})
    section = {"type": "perplexity", "metrics": ["perplexity", "nist"]}
    message = _refused(evaluation={"evaluators": [section]})
    assert "the metric nist reads texts, and perplexity gives token_losses and token_ids" in message
    assert "It is the name of a plugin of another kind: metric" in _refused(evaluation={"evaluators": ["nist"]})


def test_evaluators_have_names_of_their_own_and_samples(tmp_path: Path) -> None:
    twice = ["perplexity", {"type": "perplexity", "stride": 4}]
    assert "their results and files would have the same names" in _refused(evaluation={"evaluators": twice})
    _config(evaluation={"evaluators": ["perplexity", {"type": "perplexity", "name": "other", "stride": 4}]})
    assert "must match" in _refused(evaluation={"evaluators": [{"type": "perplexity", "name": "../up"}]})
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ndata: {train: t}\nevaluation: {evaluators: [generation, {type: perplexity, data: d}]}")
    with pytest.raises(ConfigError, match="one of them has neither data of its own"):
        RunConfig.from_yaml(path, complete=True)
    RunConfig.from_yaml(path)  # a program may hand it in


def test_an_evaluator_of_another_package_and_its_metrics(install: Any) -> None:
    component = "from collie_core.api import Component, EvaluatorCan, MetricCan\n"
    component += "COUNT = Component(build='x:y', can=EvaluatorCan(feeds=('texts',)))\n"
    component += "NIST = Component(build='x:y', can=MetricCan(reads='texts'))\n"
    groups = {"collie.evaluator": {"count": "count_pack:COUNT"}, "collie.metric": {"nist": "count_pack:NIST"}}
    install("collie-count", groups=groups, files={"count_pack.py": component})
    config = _config(evaluation={"evaluators": [{"type": "count", "metrics": ["nist"], "data": "d"}]})
    (section,) = config.evaluation.evaluators
    assert (section.prefix, section.metrics[0].type) == ("count/", "nist")
    assert RunConfig.from_text(config.to_yaml()).to_yaml() == config.to_yaml()
    message = _refused(evaluation={"evaluators": [{"type": "count", "metrics": [{"type": "mist"}]}]})
    assert "evaluation.evaluators.0.metrics.0.type = 'mist': unknown metric 'mist'" in message


def test_names_of_other_kinds_and_near_names() -> None:
    assert "Did you mean 'sgd'?" in _refused(optimizer="sgdd")
    assert "unknown adapter 'zzz'" in _refused(adapter="zzz")
