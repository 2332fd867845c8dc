"""What every metric of the pack promises as a plugin."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch
from pydantic import ValidationError

import collie_metrics
from collie_core.api import Component, DetailedMetric
from collie_core.plugins import Plugins

COMPONENTS: dict[str, Component] = {
    name.lower().replace("_", "-"): getattr(collie_metrics, name) for name in collie_metrics.__all__
}
every = pytest.mark.parametrize("name", COMPONENTS)


def built(name: str, **options: Any) -> Any:
    """As an evaluation builds it."""
    plugins = Plugins.discover()
    qualified = f"collie-metrics:{name}"
    config = plugins.config_model("metric", qualified).model_validate({"type": name, **options})
    return plugins.build("metric", qualified, config=config)


def test_the_entry_points_are_the_components() -> None:
    found = {entry.name: entry for entry in entry_points(group="collie.metric") if entry.module == "collie_metrics"}
    assert {name: entry.load() for name, entry in found.items()} == COMPONENTS


@every
def test_the_section_is_documented_and_strict(name: str) -> None:
    config = Plugins.discover().config_model("metric", f"collie-metrics:{name}")
    assert all(field.description for key, field in config.model_fields.items() if key != "type")
    with pytest.raises(ValidationError, match="zzz"):
        config.model_validate({"type": name, "zzz": 1})


@every
def test_its_defaults_are_those_of_the_class(name: str) -> None:
    module, _, attribute = COMPONENTS[name].build.partition(":")
    alone, configured = getattr(import_module(module), attribute)(), built(name)
    state = [{key: value for key, value in vars(metric).items() if key != "scorer"} for metric in (alone, configured)]
    assert state[0] == state[1]
    if scorer := vars(alone).get("scorer"):
        plain = [
            {key: value for key, value in vars(metric.scorer).items() if isinstance(value, str | int | float | list)}
            for metric in (alone, configured)
        ]
        assert plain[0] == plain[1], scorer


@every
def test_it_reads_what_it_declares(name: str) -> None:
    given: dict[str, Any] = {"texts": (["1"], [["1"]]), "choices": (["1"], ["1"]), "token_ids": (torch.ones(1),) * 2}
    metric = built(name)
    metric.update(*given[COMPONENTS[name].can.reads])  # type: ignore[attr-defined]
    assert all(isinstance(value, int | float) for value in metric.compute().values())
    assert isinstance(metric, DetailedMetric) == (name in ("bleu", "chrf", "decode"))
    assert all(isinstance(text, str) for text in getattr(metric, "details", dict)().values())


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("bleu", {"tokenize": "flores200"}, "'13a', 'intl'"),
        ("bleu", {"smooth_value": 0.5}, "smooth_value needs smooth_method: floor or add-k, not exp"),
        ("bleu", {"max_ngram_order": 0}, "greater than 0"),
        ("chrf", {"word_order": -1}, "greater than or equal to 0"),
        ("decode", {"rows": 0}, "greater than 0"),
        ("exact-match", {"unicode_form": "NFD"}, "'NFC' or 'NFKC'"),
        ("numeric-match", {"tolerance": 1}, "less than 1"),
        ("numeric-match", {"marker": ""}, "at least 1 character"),
        ("numeric-match", {"marker": None, "require_marker": True}, "require_marker needs a marker"),
        ("rouge", {"rouge_types": ["rouge9"]}, "rouge1"),
        ("rouge", {"use_stemmer": True, "tokenizer": "words"}, "use_stemmer needs tokenizer: rouge, not words"),
    ],
)
def test_wrong_values_are_refused(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        built(name, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bleu", {"tokenize": "zh", "smooth_method": "floor", "smooth_value": 0.2}),
        ("chrf", {"word_order": 2}),
        ("rouge", {"rouge_types": ["rouge3", "rougeL"], "scores": ["recall"], "use_stemmer": True}),
        ("f1", {"labels": ["a", "b"], "positive": "a"}),
    ],
)
def test_options_reach_the_metric(name: str, options: dict[str, Any]) -> None:
    metric = built(name, **options)
    kept = vars(metric) | vars(getattr(metric, "scorer", object.__new__(type("Nothing", (), {}))))
    for key, value in options.items():
        if key in kept:
            assert list(kept[key]) == list(value) if isinstance(value, list) else kept[key] == value


def test_a_description_costs_none_of_the_libraries() -> None:
    code = """
import json, sys
from collie_core.plugins import Plugins
import collie_metrics
plugins = Plugins.discover()
for name in plugins.names("metric"):
    plugins.component("metric", f"collie-metrics:{name}") if name != "perplexity" else None
    plugins.config_model("metric", f"collie-metrics:{name}") if name != "perplexity" else None
print(json.dumps([name for name in ("torch", "sacrebleu", "rouge_score", "nltk", "numpy") if name in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_an_underscore_is_as_good_as_a_hyphen() -> None:
    plugins = Plugins.discover()
    assert plugins.find("metric", "exact_match") == plugins.find("metric", "Exact-Match")
