"""Whatever is in the file: never a traceback, exit code 2, and the message names the key."""

from __future__ import annotations

import copy
import json
import os
import string
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from collie_core.cli import main
from collie_core.config.data import DataConfig
from collie_core.config.model import ModelConfig
from collie_core.config.parallel import ParallelConfig
from collie_core.config.run import RunConfig
from collie_core.config.train import TrainConfig

GOOD: dict[str, Any] = {
    "model": {"config": {"model_type": "llama"}, "dtype": "auto"},
    "tokenizer": {"type": "byte"},
    "data": {"train": [{"path": "t.jsonl"}], "eval": "e.jsonl", "max_length": 64},
    "parallel": {"zero_stage": 0},
    "train": {"max_steps": 5, "per_device_train_batch_size": 2, "seed": 1},
    "optimizer": {"type": "adamw", "lr": 1e-3, "betas": [0.9, 0.99]},
    "lr_scheduler": {"type": "cosine", "warmup_ratio": 0.1},
    "evaluation": {"steps": 2, "evaluators": [{"type": "perplexity"}]},
    "report_to": ["tensorboard"],
    "deepspeed": {},
    "plugins": {"block": []},
}
NUMBERS = [
    ("train", "max_steps"),
    ("train", "seed"),
    ("train", "logging_steps"),
    ("train", "max_grad_norm"),
    ("train", "global_batch_size"),
    ("data", "max_length"),
    ("data", "num_workers"),
    ("parallel", "tensor_parallel_size"),
    ("parallel", "timeout_s"),
    ("optimizer", "lr"),
    ("optimizer", "eps"),
    ("lr_scheduler", "warmup_ratio"),
    ("evaluation", "steps"),
]
SECTIONS = {"model": ModelConfig, "data": DataConfig, "parallel": ParallelConfig, "train": TrainConfig}
TIMES = 4 if "COLLIE_TEST_ALL" in os.environ else 1
many = settings(
    max_examples=25 * TIMES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
names = st.text(string.ascii_lowercase + "_", min_size=3, max_size=20)


def _check(content: str | bytes | dict[str, Any], tmp_path: Path, capsys: Any, *named: str) -> None:
    path = tmp_path / "malformed.yaml"
    if isinstance(content, dict):
        content = yaml.safe_dump(content, sort_keys=False)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    code = main(["validate", str(path)])
    out, err = capsys.readouterr()
    assert (code, out) == (2, ""), content
    assert "Traceback" not in err
    assert "pydantic" not in err
    assert "Input" not in err
    assert str(path) in err
    for name in named:
        assert name in err, (name, err)
    assert main(["validate", str(path), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["problems"]


def _with(key: tuple[str, ...], value: Any) -> dict[str, Any]:
    data = copy.deepcopy(GOOD)
    data.setdefault(key[0], {})[key[1]] = value
    return data


def test_the_good_one_is_good(tmp_path: Path) -> None:
    path = tmp_path / "good.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    assert main(["validate", str(path)]) == 0


_no_number = st.one_of(
    st.text(string.ascii_letters + "éß漢 :#{}[]", min_size=1).filter(
        lambda text: text.lower() not in ("inf", "nan", "infinity")
    ),
    st.booleans(),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(names, st.integers(), max_size=3),
    st.sampled_from([float("nan"), float("inf"), float("-inf")]),
)


@many
@given(st.sampled_from(NUMBERS), _no_number)
def test_wrong_types(tmp_path: Path, capsys: Any, key: tuple[str, str], value: Any) -> None:
    _check(_with(key, value), tmp_path, capsys, ".".join(key))


@many
@given(
    st.sampled_from(NUMBERS),
    st.integers(2**63, 10**60) | st.integers(-(10**60), -1) | st.sampled_from([10**4000, 10**6000]),
)
def test_huge_and_negative_numbers(tmp_path: Path, capsys: Any, key: tuple[str, str], value: int) -> None:
    data = yaml.safe_dump(_with(key, "HUGE"), sort_keys=False)
    digits = "1" + "0" * 6000 if value == 10**6000 else None
    _check(data.replace("HUGE", digits or str(value)), tmp_path, capsys, ".".join(key))


@many
@given(st.sampled_from([*RunConfig.model_fields]), names, st.integers() | st.text(max_size=5))
def test_unknown_sections_and_keys(tmp_path: Path, capsys: Any, section: str, name: str, value: Any) -> None:
    name = f"{name}_zz"  # no name of ours, and none of another tool
    _check({**GOOD, name: value if value != "" else 1}, tmp_path, capsys, name)
    if isinstance(GOOD.get(section), dict) and section != "deepspeed":
        _check(_with((section, name), value), tmp_path, capsys, f"{section}.{name}")


@many
@given(st.data())
def test_typos(tmp_path: Path, capsys: Any, data: st.DataObject) -> None:
    section = data.draw(st.sampled_from(sorted(SECTIONS)))
    name = data.draw(st.sampled_from(sorted(SECTIONS[section].model_fields)))
    position = data.draw(st.integers(0, len(name) - 1))
    typo = name[:position] + "zq" + name[position + 1 :]
    _check(_with((section, typo), 1), tmp_path, capsys, f"{section}.{typo}")


@many
@given(st.sampled_from(["model", "data", "train", "optimizer", "evaluation", "plugins"]), st.data())
def test_sections_that_are_none(tmp_path: Path, capsys: Any, section: str, data: st.DataObject) -> None:
    value = data.draw(st.integers() | st.lists(st.integers(), min_size=1) | st.booleans() | st.floats(0, 1))
    _check({**GOOD, section: value}, tmp_path, capsys, section)


@many
@given(st.sets(st.sampled_from(["model", "data"]), min_size=1))
def test_missing_sections(tmp_path: Path, capsys: Any, missing: set[str]) -> None:
    data = {key: value for key, value in GOOD.items() if key not in missing}
    _check(data, tmp_path, capsys, *missing)


@many
@given(st.sampled_from(NUMBERS), st.integers(0, 3))
def test_duplicate_keys(tmp_path: Path, capsys: Any, key: tuple[str, str], blank: int) -> None:
    section, name = key
    text = yaml.safe_dump({**GOOD, section: {**GOOD[section], name: 1}}, sort_keys=False)
    doubled = text.replace(f"  {name}: 1\n", f"  {name}: 1\n" + "\n" * blank + f"  {name}: 1\n")
    _check(doubled, tmp_path, capsys, f"{section}.{name}", "written twice: on line")
    _check(text + f"{section}: {{}}\n", tmp_path, capsys, section, "written twice: on line")


@many
@given(st.binary(max_size=200))
def test_any_bytes(tmp_path: Path, capsys: Any, content: bytes) -> None:
    _check(content, tmp_path, capsys)


@many
@given(st.integers(0, 200), st.sampled_from([b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\xfe\xff", b"\x80"]))
def test_not_utf_8(tmp_path: Path, capsys: Any, position: int, rubbish: bytes) -> None:
    good = yaml.safe_dump(GOOD).encode()
    _check(good[:position] + rubbish + good[position:], tmp_path, capsys, "is not UTF-8")


@many
@given(st.text(alphabet=st.characters(codec="utf-8") | st.sampled_from("{}[]:-&*!|>'\"%@`#,?\n\t "), max_size=200))
def test_any_text(tmp_path: Path, capsys: Any, text: str) -> None:
    _check(text, tmp_path, capsys)


@many
@given(st.integers(2, 12), st.integers(2, 12), st.booleans())
def test_bombs(tmp_path: Path, capsys: Any, width: int, depth: int, mapping: bool) -> None:
    def item(index: int) -> str:
        parts = [f"*b{index - 1}" if index else "boom"] * width
        if mapping:
            return "{" + ", ".join(f"k{i}: {part}" for i, part in enumerate(parts)) + "}"
        return "[" + ", ".join(parts) + "]"

    bomb = "".join(f"bomb_{index}: &b{index} {item(index)}\n" for index in range(depth))
    large = width**depth > 10_000  # at least so many values; below, the keys are merely unknown
    _check(bomb + yaml.safe_dump(GOOD), tmp_path, capsys, *(["more than"] if large else []))


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda item: st.lists(item, max_size=3) | st.dictionaries(st.text(max_size=8), item, max_size=3),
    max_leaves=8,
)


@settings(many, max_examples=75 * TIMES)
@given(
    st.dictionaries(st.sampled_from([*RunConfig.model_fields, "learning_rate", "bf16", "optim"]), _values, min_size=1)
)
def test_any_values_in_the_known_sections(tmp_path: Path, capsys: Any, data: dict[str, Any]) -> None:
    _check({**data, "certainly_unknown": 1}, tmp_path, capsys, "certainly_unknown")


@settings(many, max_examples=50 * TIMES)
@given(st.text(max_size=30), _values)
def test_any_override(tmp_path: Path, capsys: Any, key: str, value: Any) -> None:
    path = tmp_path / "good.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["collie"])
        try:
            code = main(["validate", str(path), f"x{key}={value}"])
        except SystemExit as error:  # argparse's own way to say that a word is no override
            code = int(str(error.code))
    err = capsys.readouterr().err
    assert code == 2
    assert "Traceback" not in err
