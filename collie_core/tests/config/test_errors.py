"""Errors name file, line, key, value, rule and the nearest name, all at once, and never speak pydantic."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_core._pydantic_core import list_all_errors

from collie_core.config.problems import Guide, translate
from collie_core.config.run import RunConfig
from collie_core.errors import MISSING, ConfigError, Problem
from collie_core.plugins import Plugins

GOOD = "model: {model_name_or_path: m}\ndata: {train: t.jsonl, eval: e.jsonl}\n"


def _problems(text: str, *overrides: str, complete: bool = True) -> dict[str, Problem]:
    with pytest.raises(ConfigError) as caught:
        RunConfig._from_document(_read(text), overrides, [], complete)
    return {problem.key: problem for problem in caught.value.problems}


def _read(text: str) -> Any:
    from collie_core.config.loading import read_text

    return read_text(text, "run.yaml")


def _only(text: str, *overrides: str) -> Problem:
    (problem,) = _problems(text, *overrides).values()
    return problem


@pytest.mark.parametrize(
    ("line", "key", "rule"),
    [
        ("train: {max_steps: ten}", "train.max_steps", "must be a whole number"),
        ("train: {max_steps: 1.5}", "train.max_steps", "must be a whole number"),
        ("train: {max_steps: true}", "train.max_steps", "must be a number, not true or false"),
        ("train: {max_steps: 0}", "train.max_steps", "must be greater than 0"),
        ("train: {max_steps: 99999999999999999999}", "train.max_steps", "must be smaller than 2^63"),
        ("train: {max_grad_norm: .nan}", "train.max_grad_norm", "must be a finite number"),
        ("train: {seed: [1]}", "train.seed", "must be a whole number"),
        ("train: {output_dir: 5}", "train.output_dir", "must be text"),
        ("train: {output_dir: 's3://bucket/run'}", "train.output_dir", "must be a folder of this machine, not a URL"),
        ("train: {overwrite_output_dir: maybe}", "train.overwrite_output_dir", "must be true or false"),
        ("train: 5", "train", "must be a section"),
        ("optimizer: {type: adamw, lr: -1}", "optimizer.lr", "must be greater than 0"),
        ("optimizer: {type: adamw, betas: [0.9]}", "optimizer.betas", "has too few items"),
        ("optimizer: {type: adamw, betas: [0.9, 2]}", "optimizer.betas.1", "must be less than 1"),
        ("adapter: {r: 1}", "adapter.type", "is required"),
        ("optimizer: {type: 5}", "optimizer.type", "must be text"),
        ("optimizer: 5", "optimizer", "must be a section with `type:`, or the name of a plugin"),
        ("optimizer: {type: sgd, nesterov: true}", "optimizer", "nesterov needs a momentum above 0"),
        (
            "parallel: {data_parallel_size: many}",
            "parallel.data_parallel_size",
            "must be a whole number or 'auto'",
        ),
        ("report_to: [wandbb]", "report_to.0", "unknown tracker 'wandbb'. Did you mean 'wandb'"),
        (
            "evaluation: {best: {metric: loss, mode: min}}",
            "evaluation.best.metric",
            "must be a result as metrics.jsonl",
        ),
        ("evaluation: {best: {mode: min}}", "evaluation.best.metric", "is required"),
        ("deepspeed: {a: .inf}", "deepspeed", "holds a number that is not finite: a"),
        ("evaluation: {evaluators: [5]}", "evaluation.evaluators.0", "must be a section with `type:`"),
        ("plugins: {block: [collie-core]}", "plugins.block", "cannot be blocked"),
    ],
)
def test_one_rule_in_words(line: str, key: str, rule: str) -> None:
    problem = _only(GOOD + line)
    assert problem.key == key
    assert rule in problem.rule
    assert problem.origin == "run.yaml:3"


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("train: {max_step: 1}", "Did you mean max_steps?"),
        ("trian: {}", "Did you mean train?"),
        ("trian:", "Did you mean train?"),
        ("optimizer: {type: adamw, beta: [0, 0]}", "Did you mean betas?"),
        ("train: {packing: true}", "It belongs to data: data.packing."),
        ("max_steps: 5", "It belongs to train: train.max_steps."),
        ("train: {weight_decay: 1}", "It belongs to optimizer: optimizer.weight_decay."),
        ("data: {train: [{path: x, wieght: 2}]}", "Did you mean weight?"),
        (
            "evaluation: {evaluators: [{type: perplexity, zzz: 1}]}",
            "Known here: batch_size, data, metrics, name, stride, type, window.",
        ),
        ("model: {dtype: bfloat61}", "Did you mean bfloat16?"),
        ("lr_scheduler: cosin", "Did you mean cosine?"),
        ("train: {output_dir: 5}", "put it in quotes"),
        ("optimizer: sgdd", ""),
    ],
)
def test_the_nearest_name(line: str, hint: str) -> None:
    section = line.partition(":")[0]
    text = "".join(row + "\n" for row in GOOD.splitlines() if not row.startswith(f"{section}:"))
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_text(text + line)
    (problem,) = caught.value.problems
    assert hint in problem.hint
    if not hint:
        assert "Did you mean 'sgd'?" in problem.rule


def test_all_problems_at_once_with_their_lines() -> None:
    text = (
        "model: {config: {model_type: llama}, model_name_or_path: x}\n"  # a rule
        "data:\n  max_length: -1\n  max_length: 3\n"  # a field, a double key
        "trian: {}\n"  # an unknown section
        "parallel: {sequence_parallel: true}\n"  # a rule of a sound section
        "bf16: true\ntorch_dtype: float16\n"  # two names for one thing
    )
    problems = _problems(text, "optimizer.lr=fast", "nonsense")
    lines = {key: problem.origin.rpartition(":")[2] for key, problem in problems.items()}
    assert lines == {
        "nonsense": "command line",
        "optimizer.lr": "command line",
        "model.config": "1",
        "data.max_length": "4",
        "trian": "5",
        "parallel.sequence_parallel": "6",
        "torch_dtype": "8",
    }


def test_a_message_in_full() -> None:
    problem = _only(GOOD + "train:\n  max_steps: 1e-3\n")
    assert str(problem) == "run.yaml:4: train.max_steps = 0.001: must be a whole number."


@pytest.mark.parametrize("error", list_all_errors(), ids=lambda error: error["type"])
def test_no_error_of_pydantic_speaks_pydantic(error: dict[str, Any]) -> None:
    kind, context = error["type"], error.get("example_context") or {}
    if kind in ("value_error", "assertion_error"):
        context = {"error": ValueError("its own words")}
    raised = ValidationError.from_exception_data("x", [{"type": kind, "loc": ("train",), "input": 5, "ctx": context}])
    (problem,) = translate(raised, {"train": 5}, Guide(RunConfig, Plugins.discover()))
    assert "Input" not in problem.rule
    assert "pydantic.dev" not in str(problem)
    assert problem.key == ("train.train" if kind == "missing" else "train")


def test_members_of_a_union_are_no_keys() -> None:
    class Model(BaseModel):
        size: int | str | list[int] = 1
        inner: dict[str, int | None] = Field({})

        @model_validator(mode="after")
        def _never(self) -> Model:
            raise AssertionError("never")

    data = {"size": {"a": 1}, "inner": {"x": "y"}}
    with pytest.raises(ValidationError) as caught:
        Model(**data)  # type: ignore[arg-type]
    problems = translate(caught.value, data, Guide(Model, Plugins.discover()))
    assert [problem.key for problem in problems] == ["size", "inner.x"]
    assert problems[0].rule == "must be a whole number or text or a list"


def test_missing_values_are_not_shown() -> None:
    problem = _problems("data: {train: x}\n")["model.model_name_or_path"]
    assert problem.value is MISSING
    assert str(problem).startswith("run.yaml: model.model_name_or_path: is required")
