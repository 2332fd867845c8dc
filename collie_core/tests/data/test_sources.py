"""Reading rows: exact values, and one sentence with file, line and column for whatever is broken."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from collie_core.config.data import SourceConfig
from collie_core.data.sources import Row, Source, handed_rows
from collie_core.errors import DataError


def read(path: Path | str, split: str | None = None) -> list[Row]:
    return list(Source(SourceConfig(path=str(path), split=split)).rows())


def values(path: Path, split: str | None = None) -> list[Any]:
    return [dict(row.values) for row in read(path, split)]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# -- what is read -------------------------------------------------------------------------------------------


def test_json_lines_keep_their_values_and_know_their_lines(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", '\ufeff{"x": 5}\r\n\n{"x": "5", "y": [1.0, null, true]}\n{"x": "a\u2028b"}')
    assert read(file) == [
        (f"{file}:1", {"x": 5}),
        (f"{file}:3", {"x": "5", "y": [1.0, None, True]}),
        (f"{file}:4", {"x": "a\u2028b"}),
    ]


@pytest.mark.parametrize(
    "content", ['[{"x": 1}, {"x": 2}]', '{"data": [{"x": 1}, {"x": 2}]}', '{"x": 1}\n{"x": 2}\n'], ids=str
)
def test_json_files_hold_a_list_or_lines(tmp_path: Path, content: str) -> None:
    assert values(write(tmp_path / "a.json", content)) == [{"x": 1}, {"x": 2}]


def test_csv_values_stay_text(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", '\ufeffinput,output\nNA,007\n"x,\ny",\n')
    assert values(file) == [{"input": "NA", "output": "007"}, {"input": "x,\ny", "output": ""}]
    assert [row.origin for row in read(file)] == [f"{file} row 1", f"{file} row 2"]


def test_parquet_keeps_nested_values(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    datasets.disable_progress_bars()
    datasets.Dataset.from_list([row, row]).to_parquet(str(tmp_path / "a.parquet"))
    assert values(tmp_path / "a.parquet") == [row, row]


def test_text_is_a_sample_per_line(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "one\n \n  two\n")
    assert read(file) == [(f"{file}:1", {"text": "one"}), (f"{file}:3", {"text": "  two"})]


def test_rows_of_a_program_are_any_mappings() -> None:
    rows = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    assert list(handed_rows(rows, "data.train")) == [
        ("data.train row 1", {"text": "a"}),
        ("data.train row 2", {"text": "b"}),
    ]
    with pytest.raises(DataError, match=r"data\.train row 1: a row is an object"):
        list(handed_rows(["a"], "data.train"))


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", range(10)),
        ("train[:30%]", range(3)),
        ("train[70%:]", range(7, 10)),
        ("train[-2:]", [8, 9]),
        ("train[2:4]", [2, 3]),
        ("train[:1]+train[-1:]", [0, 9]),
        ("train[5:200]", range(5, 10)),
    ],
)
def test_local_files_can_be_sliced(tmp_path: Path, split: str, expected: Any) -> None:
    file = write(tmp_path / "a.jsonl", "".join(f'{{"i": {number}}}\n' for number in range(10)))
    assert [row["i"] for row in values(file, split)] == list(expected)


def test_two_parts_of_a_file_share_no_row(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", "".join(f'{{"i": {number}}}\n' for number in range(7)))
    parts = values(file, "train[:90%]") + values(file, "train[90%:]")
    assert parts == values(file)


def test_a_hub_data_set_is_asked_for_by_name_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return datasets.Dataset.from_list([{"text": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = Source(SourceConfig(path="org/stories", split="test[:10%]"))
    assert source.identity()[:2] == ["hub", "org/stories"]
    assert list(source.rows()) == [("org/stories row 1", {"text": "a"})]
    assert asked == [("org/stories", "test[:10%]")]


def test_a_changed_file_has_another_identity(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", '{"x": 1}')
    before = Source(SourceConfig(path=str(file))).identity()
    write(file, '{"x": 12}')
    assert Source(SourceConfig(path=str(file))).identity() != before


# -- what is refused ----------------------------------------------------------------------------------------

BROKEN = {
    "trailing comma": ("a.jsonl", '{"x": 1}\n{"x": 2,}\n', r"a\.jsonl:2:9: this is not JSON: "),
    "not UTF-8": ("a.jsonl", b'{"x": 1}\n{"x": "\xe9"}\n', r"a\.jsonl:2:8: byte 0xe9 is not UTF-8"),
    "a list": ("a.jsonl", "[1]\n", r"a\.jsonl:1: a row is an object .* not list"),
    "NaN": ("a.jsonl", '{"x": NaN}', r"a\.jsonl:1: this is not JSON: JSON has no NaN"),
    "a huge number": ("a.jsonl", '{"x": ' + "9" * 5000 + "}", r"a\.jsonl:1: this is not JSON: "),
    "endless nesting": ("a.jsonl", "[" * 100_000, r"a\.jsonl:1: this is not JSON: "),
    "empty": ("a.jsonl", "", r"a\.jsonl holds no rows$"),
    "blank": ("a.jsonl", "\n \n", r"a\.jsonl holds no rows$"),
    "broken list": ("a.json", '[{"x": 1},\n{"x"}]', r"a\.json:2:5: this is not JSON: "),
    "a number in a list": ("a.json", '{"data": [{"x": 1}, 3]}', r"a\.json row 2: a row is an object"),
    "a number": ("a.json", "3", r"a\.json holds neither a list of objects nor "),
    "no text": ("a.txt", b"a\n\xff\n", r"a\.txt:2:1: byte 0xff is not UTF-8"),
    "too many columns": ("a.csv", "x,y\n1,2\n1,2,3\n", r"a\.csv cannot be read as csv: .*line 3"),
    "a csv not UTF-8": ("a.csv", b"x\n\xe9\n", r"a\.csv cannot be read as csv: .*utf-8"),
    "an empty csv": ("a.csv", "", r"a\.csv cannot be read as csv: "),
    "torn parquet": ("a.parquet", b"PAR1", r"a\.parquet cannot be read as parquet: "),
    "unknown suffix": ("a.xlsx", "", r"a\.xlsx: unknown kind of file '\.xlsx'; known are \.jsonl \.json"),
}


@pytest.mark.parametrize(("name", "content", "message"), BROKEN.values(), ids=BROKEN)
def test_what_is_broken_is_named(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / name, content))


def test_a_missing_file_gives_the_nearest_names(tmp_path: Path) -> None:
    near = write(tmp_path / "train.jsonl", "{}")
    with pytest.raises(DataError, match=rf"trian\.jsonl does not exist; did you mean {re.escape(str(near))}\?"):
        read(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match=rf"its folder is missing too, only {re.escape(str(tmp_path))} is there"):
        read(tmp_path / "no" / "such" / "a.jsonl")


def test_a_folder_gives_the_files_in_it(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", "{}")
    with pytest.raises(DataError, match=r"is a folder; name a file in it \(train\.jsonl\)"):
        read(tmp_path)


@pytest.mark.parametrize("split", ["test", "train[", "train[:x]"])
def test_a_split_that_is_none_is_refused(tmp_path: Path, split: str) -> None:
    with pytest.raises(DataError, match=r"1 rows, all in the split train; cannot take split="):
        read(write(tmp_path / "a.jsonl", "{}"), split)


def test_an_empty_slice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no rows in train\[5:\]"):
        read(write(tmp_path / "a.jsonl", "{}"), "train[5:]")


def test_a_hub_data_set_out_of_reach_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, split: str) -> None:
        raise ConnectionError(f"Couldn't reach '{name}'\non the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"^org/stories is no file here, .*: Couldn't reach 'org/stories' on the Hub$"):
        read("org/stories")


lines = st.one_of(
    st.binary(max_size=30),
    st.dictionaries(st.text(max_size=3), st.text(max_size=5), max_size=2).map(lambda row: json.dumps(row).encode()),
    st.sampled_from([b'{"a": 1}', b'{"a": ', b"\xef\xbb\xbf", b"[]", b"NaN", b'"\\ud800"', b"{} {}", b"-", b"\x00"]),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None)
@given(st.lists(lines, max_size=5).map(b"\n".join), st.sampled_from(["a.jsonl", "a.json", "a.txt"]))
def test_any_bytes_are_rows_or_a_data_error(tmp_path: Path, content: bytes, name: str) -> None:
    file = write(tmp_path / name, content)
    try:
        rows: list[Row] | DataError = read(file)
    except DataError as error:
        rows = error
    if isinstance(rows, DataError):
        assert str(file) in str(rows)
    else:
        assert rows
        assert all(isinstance(row.values, dict) for row in rows)
