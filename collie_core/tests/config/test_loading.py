"""YAML as it is meant: YAML 1.2 scalars, lines of keys, and files that only try to do harm."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from collie_core.config.loading import MAX_DEPTH, MAX_NODES, dump, read_file, read_text
from collie_core.errors import ConfigError


def _value(text: str) -> Any:
    document = read_text(f"key: {text}\n", "run.yaml")
    assert not document.problems
    return document.data["key"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("-.5", -0.5),
        ("5.", 5.0),
        ("3.0e-4", 3e-4),
        ("017", 17),
        ("0x1f", 31),
        ("0o17", 15),
        ("+3", 3),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("12:30:45", "12:30:45"),
        ("2024-01-01", "2024-01-01"),
        ("1_000", "1_000"),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("", None),
        ("null", None),
        ("'5'", "5"),
        ("!!str 5", "5"),
        ("!!float 5", 5.0),
        ("-.inf", float("-inf")),
        (".INF", float("inf")),
        ("[1, {a: b}]", [1, {"a": "b"}]),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    found = _value(text)
    assert found == value
    assert type(found) is type(value)


def test_lines_of_keys_values_and_items_are_kept() -> None:
    text = "model:\n  config:\n    a: 1\n\ndata:\n  train:\n    - path: x\n    - y\n  eval:\n    z\n"
    origins = read_text(text, "run.yaml").origins
    assert origins["model.config.a"] == "run.yaml:3"
    assert origins["data.train"] == "run.yaml:6"
    assert origins["data.train.0.path"] == "run.yaml:7"
    assert origins["data.train.1"] == "run.yaml:8"
    assert origins["data.eval"] == "run.yaml:10"  # the value's own line


def test_keys_are_text_whatever_they_look_like() -> None:
    assert read_text("{1: a, on: b, null: c, 1e5: d}", "x").data == {
        "1": "a",
        "on": "b",
        "null": "c",
        "1e5": "d",
    }


@pytest.mark.parametrize(
    ("text", "rule", "line"),
    [
        ("", "is empty", None),
        ("# only a comment\n", "is empty", None),
        ("- a\n", "must hold sections", 1),
        ("just text", "must hold sections", 1),
        ("a: [1, 2\nb: 3\n", "not valid YAML", 2),
        ("a: 'x\n", "not valid YAML", 2),
        ("a:\n\t- b\n", "not valid YAML", 2),
        ("a: 1\n---\nb: 2\n", "not valid YAML", 2),
        ("a: *nobody\n", "undefined alias", 1),
        ("a: \x00\n", "character that YAML forbids", 1),
        ('a: "\\UFFFFFFFF"\n', "not valid YAML", None),
        ("a: &a [*a]\n", "contains itself", 1),
        ("%YAML 9.0\n---\na: 1\n", "not valid YAML", None),
    ],
)
def test_a_file_that_is_no_configuration(text: str, rule: str, line: int | None) -> None:
    with pytest.raises(ConfigError) as caught:
        read_text(text, "run.yaml")
    (problem,) = caught.value.problems
    assert rule in problem.rule
    assert problem.origin == (f"run.yaml:{line}" if line else problem.origin)
    assert problem.origin.startswith("run.yaml")


@pytest.mark.parametrize(
    ("text", "key", "rule"),
    [
        ("a: 1\nb: 2\na: 3\n", "a", "written twice: on line 1 and on line 3"),
        ("s:\n  a: 1\n  a: 2\n", "s.a", "written twice: on line 2 and on line 3"),
        ("s: {? [1] : 2}\n", "s", "key that is not plain text"),
        ("b: &b {x: 1}\ns:\n  <<: *b\n", "s.<<", "merging with << is not supported"),
        ("a: !!python/object/apply:os.system [ls]\n", "a", "tags are not supported"),
        ("a: !mine 5\n", "a", "tags are not supported"),
        ("a: !!binary aGk=\n", "a", "tags are not supported"),
        ("a: !!int abc\n", "a", "tags are not supported"),
        (f"a: {'9' * 5000}\n", "a", "beyond 2^63"),
        ('a: "\\ud800"\n', "a", "surrogate"),
    ],
)
def test_a_key_that_cannot_be_meant(text: str, key: str, rule: str) -> None:
    (problem,) = read_text(text, "run.yaml").problems
    assert problem.key == key
    assert rule in problem.rule
    assert problem.origin.startswith("run.yaml:")


@pytest.mark.parametrize(
    "text",
    [
        "a: " + "[" * 100_000,
        "a: " + "{a: " * 10_000,
        "- " * 10_000,
        "a: &0 [x]\n" + "".join(f"b{i}: &{i} [{', '.join([f'*{i - 1}'] * 10)}]\n" for i in range(1, 12)),
        "a: [" + "1, " * (MAX_NODES + 1) + "]",
        "".join("  " * depth + "k:\n" for depth in range(MAX_DEPTH + 2)),
    ],
    ids=["flow", "mappings", "sequences", "laughs", "long", "deep"],
)
def test_bombs_are_refused_quickly(text: str) -> None:
    start = time.process_time()
    with pytest.raises(ConfigError, match=r"more than|not valid YAML"):
        read_text(text, "run.yaml")
    assert time.process_time() - start < 5  # seconds; unrefused, hours or the memory of the machine


def test_anchors_and_aliases_work() -> None:
    assert read_text("a: &x {b: 1}\nc: *x\n", "x").data == {"a": {"b": 1}, "c": {"b": 1}}


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"model:\n  a: \xff\xfe\n")
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (1 << 21))
    for path, rule in (
        (tmp_path / "none.yaml", "No such file"),
        (tmp_path, "directory"),
        (binary, "is not UTF-8: byte 0xff"),
        (large, "is larger than 1 MiB"),
        (Path("a\0b"), "null"),
    ):
        with pytest.raises(ConfigError, match=rule) as caught:
            read_file(path)
        assert str(path).partition("\0")[0] in str(caught.value)
    with pytest.raises(ConfigError, match=r"binary\.yaml:2"):
        read_file(binary)


def test_a_byte_order_mark_is_no_character(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes("a: ü\n".encode("utf-8-sig"))
    assert read_file(tmp_path / "run.yaml").data == {"a": "ü"}


_scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text()
_texts = st.sampled_from(["1e-5", "yes", "no", "0o17", "1:30", "2024-01-01", "~", "", ".inf", "=", "<<", "+1e5", "0b1"])


@given(st.dictionaries(st.text(min_size=1), st.recursive(_scalars | _texts, lambda item: st.lists(item, max_size=3))))
def test_what_is_written_reads_back(data: dict[str, Any]) -> None:
    data.pop("<<", None)
    text = dump(data)
    if data:
        document = read_text(text, "x")
        assert not document.problems
        assert document.data == data
    assert yaml.safe_load(text) == data  # and so it does in a reader of YAML 1.1
