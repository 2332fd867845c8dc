"""`RunConfig`: one door from Python and YAML, derived values, aliases, overrides, round trips."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from collie_core.config.aliases import ALIASES
from collie_core.config.data import DataConfig, SourceConfig
from collie_core.config.model import ModelConfig
from collie_core.config.run import RunConfig
from collie_core.errors import ConfigError

GOOD: dict[str, Any] = {"model": {"model_name_or_path": "m"}, "data": {"train": "t.jsonl", "eval": "e.jsonl"}}
TEXT = "model: {model_name_or_path: m}\ndata: {train: t.jsonl, eval: e.jsonl}\n"


def _config(**sections: Any) -> RunConfig:
    return RunConfig(**{**GOOD, **sections})


def _train(**fields: Any) -> RunConfig:
    return _config(train=fields)


def test_python_and_yaml_are_the_same_door(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(TEXT + "train: {max_steps: 3}\n")
    config = _train(max_steps=3)
    assert RunConfig.from_yaml(tmp_path / "run.yaml") == config
    assert RunConfig.from_text(TEXT, ["train.max_steps=3"]) == config
    assert RunConfig.model_validate({**GOOD, "train": {"max_steps": 3}}) == config
    typed = RunConfig(
        model=ModelConfig(model_name_or_path="m"),
        data=DataConfig(train=[SourceConfig(path="t.jsonl")], eval=[SourceConfig(path="e.jsonl")]),
        train=config.train,
    )
    assert typed == config
    assert config != _train(max_steps=4)


def test_python_raises_config_errors_too() -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig(model={"model_name_or_path": "m"}, train={"max_steps": "x", "max_stps": 1}, data={"train": 5})
    assert [problem.key for problem in caught.value.problems] == [
        "data.train",
        "train.max_steps",
        "train.max_stps",
    ]
    assert not any(problem.origin for problem in caught.value.problems)


def test_a_program_may_hand_in_what_a_file_must_have() -> None:
    assert RunConfig().data.train == []
    assert RunConfig.from_text("train: {max_steps: 1}").model.config is None


def test_what_was_handed_in_is_not_changed() -> None:
    given = {"train": {"learning_rate": 1e-3, "max_steps": 1}, "optimizer": "sgd", **GOOD}
    config = RunConfig(**given)
    assert config.optimizer.lr == 1e-3
    assert given["train"] == {"learning_rate": 1e-3, "max_steps": 1}
    assert given["optimizer"] == "sgd"


def test_everything_written_reads_back() -> None:
    config = RunConfig(
        model={"config": {"model_type": "llama", "rope": {"x": [1, None, True, "1e-5", "no"]}}},
        tokenizer="byte",
        data={
            "train": ["a", {"path": "b", "split": "train[:9%]", "weight": 0.5}],
            "chat_template": "{{ x }}\n\té: #",
        },
        parallel={"zero_stage": 1, "data_parallel_size": 4},
        train={"num_train_epochs": 1.5, "global_batch_size": 8, "max_grad_norm": None},
        optimizer={"type": "adamw", "lr": 1e-5, "betas": [0.9, 0.95]},
        lr_scheduler="cosine",
        evaluation={"evaluators": ["perplexity"], "steps": 3},
        report_to="tensorboard",
        deepspeed={"zero_optimization": {"overlap_comm": False}},
        plugins={"block": ["some-pack"]},
    )
    again = RunConfig.from_text(config.to_yaml())
    assert again == config
    assert again.to_yaml() == config.to_yaml()


_plain = (
    st.none() | st.booleans() | st.integers(-(2**63) + 1, 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
)
_free = st.recursive(
    _plain | st.text(), lambda item: st.lists(item, max_size=3) | st.dictionaries(st.text(), item, max_size=3)
)


@given(st.dictionaries(st.text().filter(lambda key: key != "<<"), _free, max_size=4), st.text(min_size=1))
def test_any_text_and_number_reads_back(free: dict[str, Any], path: str) -> None:
    if "<<" in str(free):
        return
    config = RunConfig(model={"config": {**free, "model_type": "x"}}, tokenizer="byte", data={"train": path})
    assert RunConfig.from_text(config.to_yaml()) == config


def test_it_can_be_copied_and_sent_to_another_process() -> None:
    config = _train(max_steps=3)
    config.registry.hook_manager()  # holds what cannot be pickled
    received = pickle.loads(pickle.dumps(config))  # noqa: S301
    assert received == config
    assert received.registry is not config.registry
    assert config.model_copy(update={"report_to": ["tensorboard"]}).registry is config.registry
    assert hasattr(config, "registry")


# -- the global batch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "ranks", "sizes"),
    [
        ({}, 1, (1, 1, 1)),
        ({"per_device_train_batch_size": 4}, 2, (4, 1, 8)),
        ({"gradient_accumulation_steps": 4}, 2, (1, 4, 8)),
        ({"global_batch_size": 8}, 2, (1, 4, 8)),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}, 2, (2, 3, 12)),
        ({"per_device_train_batch_size": 2, "global_batch_size": 16}, 2, (2, 4, 16)),
        ({"gradient_accumulation_steps": 2, "global_batch_size": 16}, 2, (4, 2, 16)),
        (
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "global_batch_size": 16},
            2,
            (2, 4, 16),
        ),
    ],
)
def test_any_two_sizes_decide_the_third(fields: dict[str, int], ranks: int, sizes: tuple[int, int, int]) -> None:
    config = _train(**fields)
    assert config.per_device_train_batch_size(ranks) == sizes[0]
    assert config.gradient_accumulation_steps(ranks) == sizes[1]
    assert config.global_batch_size(ranks) == sizes[2]
    assert config.train == _train(**fields).train  # what was written stays as it was written


@pytest.mark.parametrize(
    ("fields", "ranks", "arithmetic"),
    [
        (
            {"per_device_train_batch_size": 4, "global_batch_size": 10},
            1,
            "per_device_train_batch_size x data_parallel_size = 4 x 1 = 4",
        ),
        ({"per_device_train_batch_size": 4, "global_batch_size": 8}, 3, "x data_parallel_size = 4 x 3 = 12"),
        (
            {"gradient_accumulation_steps": 3, "global_batch_size": 8},
            1,
            "gradient_accumulation_steps x data_parallel_size = 3 x 1 = 3",
        ),
        ({"global_batch_size": 7}, 2, "a multiple of data_parallel_size = 2"),
        (
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "global_batch_size": 8},
            1,
            "x gradient_accumulation_steps x data_parallel_size = 2 x 2 x 1 = 4",
        ),
    ],
)
def test_a_global_batch_that_is_not_whole(fields: dict[str, int], ranks: int, arithmetic: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _config(train=fields, parallel={"data_parallel_size": ranks})
    (problem,) = caught.value.problems
    assert problem.key == "train.global_batch_size"
    assert arithmetic in problem.rule
    assert "Set train.global_batch_size to" in problem.hint


def test_a_global_batch_that_needs_more_ranks_waits_for_them() -> None:
    config = _train(per_device_train_batch_size=4, gradient_accumulation_steps=1, global_batch_size=16)
    assert config.batch_sizes(4).total == 16
    with pytest.raises(ConfigError, match="= 4 x 1 x 2 = 8"):
        config.batch_sizes(2)


def test_what_is_derived_is_not_stored() -> None:
    assert _config().num_train_epochs == 1.0
    assert _config().train.num_train_epochs is None
    assert _train(max_steps=5).num_train_epochs is None
    assert _train(num_train_epochs=2).num_train_epochs == 2.0


# -- aliases ------------------------------------------------------------------------------------------------

_WRITTEN = {
    "bf16": (True, "bfloat16"),
    "fp16": (True, "float16"),
    "precision": ("bf16", "bfloat16"),
    "torch_dtype": ("float32", "float32"),
    "flash_attn": (True, "flash_attention_2"),
    "use_flash": (True, "flash_attention_2"),
    "attn_impl": ("eager", "eager"),
    "train_on_inputs": (False, "completion"),
    "train_on_prompt": (True, "all"),
    "mask_prompt": (True, "completion"),
    "completion_only_loss": (True, "completion"),
    "assistant_only_loss": (True, "assistant"),
    "activation_checkpointing": (True, "full"),
    "checkpointing": ("full", "full"),
    "sample_packing": (True, True),
    "neat_packing": (True, True),
    "optim": ("adamw_torch", "adamw"),
    "optimizer.name": ("sgd", "sgd"),
    "lr_scheduler_type": ("cosine", "cosine"),
    "base_model": ("x", "x"),
    "model_id": ("x", "x"),
    "train_file": ("x", [SourceConfig(path="x")]),
    "validation_file": ("x", [SourceConfig(path="x")]),
    "resume_from_checkpoint": (True, "auto"),
    "ds_config": ({"a": 1}, {"a": 1}),
}
_SIZES = ("tp", "pp", "tensor", "pipeline")  # other sizes than 1 are refused by the rules


@pytest.mark.parametrize("name", [name for name, alias in ALIASES.items() if not alias.target.startswith("adapter")])
def test_names_of_other_tools(name: str, tmp_path: Path) -> None:
    written, kept = _WRITTEN.get(name, (1, 1) if name.startswith(_SIZES) else (2, 2))
    target = ALIASES[name].target
    sections: dict[str, Any] = copy.deepcopy(GOOD)
    if target == "deepspeed":
        sections["parallel"] = {"zero_stage": 1}
    section, _, field = target.rpartition(".")
    sections.get(section, {}).pop(field, None)
    place, _, key = name.rpartition(".")
    (sections.setdefault(place, {}) if place else sections)[key] = written
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(sections))
    notes: list[str] = []
    value: Any = RunConfig.from_yaml(path, notes=notes)
    for part in target.split("."):
        value = getattr(value, part)
    assert value == kept
    (note,) = notes
    assert note.startswith(f"{path}:")
    assert note.endswith(f"{name} is called {target} here")


def test_a_name_may_stand_in_another_section() -> None:
    config = RunConfig.from_text(TEXT + "train: {learning_rate: 1e-3, micro_batch_size: 2}\noptimizer: sgd\n")
    assert (config.optimizer.type, config.optimizer.lr) == ("sgd", 1e-3)
    assert config.train.per_device_train_batch_size == 2
    assert RunConfig.from_text("model: some/model\n").model.model_name_or_path == "some/model"
    assert RunConfig.from_text(TEXT + "deepspeed: zero3\n").parallel.zero_stage == 3
    assert RunConfig.from_text(TEXT + "bf16: false\nfp16: true\n").model.dtype == "float16"


@pytest.mark.parametrize(
    "text",
    [
        "learning_rate: 1\noptimizer: {type: sgd, lr: 2}\n",
        "optim: sgd\noptimizer: adamw\n",
        "optim: sgd\noptimizer: {name: sgd}\n",
    ],
)
def test_two_names_for_one_thing(text: str) -> None:
    with pytest.raises(
        ConfigError, match=r"<text>:.* is another name of optimizer\.(lr|type), which is written as well"
    ):
        RunConfig.from_text(TEXT + text)


def test_a_mistake_under_another_name_is_told_where_it_was_written() -> None:
    with pytest.raises(ConfigError, match=r"^<text>:4: optimizer\.lr = 'x': must be a number\.$"):
        RunConfig.from_text(TEXT + "train:\n  learning_rate: x\n")


def test_sections_without_content_are_not_written() -> None:
    assert RunConfig.from_text(TEXT + "train:\n  # max_steps: 5\nadapter:\n") == RunConfig.from_text(TEXT)


# -- overrides ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.max_steps=10", ("train", "max_steps"), 10),
        ("optimizer.lr=1e-4", ("optimizer", "lr"), 1e-4),
        ("learning_rate=1e-4", ("optimizer", "lr"), 1e-4),
        ("train.output_dir=a=b", ("train", "output_dir"), "a=b"),
        ("train.output_dir='10'", ("train", "output_dir"), "10"),
        ("train.max_grad_norm=null", ("train", "max_grad_norm"), None),
        ("train.max_grad_norm=", ("train", "max_grad_norm"), None),
        ("data.packing=yes", ("data", "packing"), True),
        ("data.eval.0.weight=2", ("data", "eval", 0, "weight"), 2.0),
        ("data.eval=[{path: z}]", ("data", "eval", 0, "path"), "z"),
        ("optimizer={type: sgd, momentum: 0.5}", ("optimizer", "momentum"), 0.5),
        ("optimizer=sgd", ("optimizer", "type"), "sgd"),
        (
            "deepspeed.zero_optimization.overlap_comm=true",
            ("deepspeed", "zero_optimization", "overlap_comm"),
            True,
        ),
        ("report_to=[tensorboard]", ("report_to", 0, "type"), "tensorboard"),
        ("report_to=csv", ("report_to", 0, "type"), "csv"),
        ("report_to={type: wandb, project: p}", ("report_to", 0, "project"), "p"),
        ("evaluation.best={metric: eval/loss, mode: min}", ("evaluation", "best", "mode"), "min"),
        ("evaluation.evaluators.0.type=perplexity", ("evaluation", "evaluators", 0, "type"), "perplexity"),
        ("lr_scheduler.warmup_steps=5", ("lr_scheduler", "type"), "cosine"),
        ("bf16=true", ("model", "dtype"), "bfloat16"),
        ("bf16=false", ("model", "dtype"), "auto"),
        ("train=", ("train", "max_steps"), None),
    ],
)
def test_overrides(override: str, key: tuple[str | int, ...], value: Any) -> None:
    text = (
        "parallel: {zero_stage: 1}\nmodel: {model_name_or_path: m}\n"
        "data: {train: t, eval: [{path: e}]}\ntrain: {max_steps: 5}\n"
        "optimizer: {type: adamw, lr: 1}\nlr_scheduler: cosine\n"
        "evaluation: {evaluators: [{type: perplexity}]}\n"
    )
    found: Any = RunConfig.from_text(text, [override])
    for part in key:
        found = found[part] if isinstance(part, int) or isinstance(found, dict) else getattr(found, part)
    assert found == value


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("nonsense", "is no override of the form key=value"),
        ("=5", "is no override of the form key=value"),
        ("train..seed=5", "is no override of the form key=value"),
        ("train.seed=[1", "is not valid YAML"),
        ("train.seed=!!python/name:os.system", "is not valid YAML"),
        ("data.train.0.path=x", "data.train is not a section, so it has no keys"),
        ("data.eval.3.path=x", "data.eval is a list of 1, with indices from 0"),
        ("data.eval.x.path=x", "data.eval is a list of 1, with indices from 0"),
        ("train.max_step=3", "is not a known key"),
        ("trian=", "is not a known key"),
        ("optimizer.type=adamv", "unknown optimizer"),
    ],
)
def test_overrides_that_cannot_be_meant(override: str, rule: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_text("model: m\ndata: {train: t, eval: [e]}\n", [override])
    (problem,) = caught.value.problems
    assert rule in problem.rule
    assert problem.origin == "command line"
