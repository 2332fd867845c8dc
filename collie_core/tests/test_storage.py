"""Files and folders by URL: fetched once and whole, put in order, refused in one sentence. The store is in memory."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from collie_core import storage
from collie_core.config.data import SourceConfig
from collie_core.data.sources import Source
from collie_core.errors import CollieError, DataError
from collie_core.storage import Place, StorageError, exists, fetch, is_url, local_folder, put_folder


@pytest.fixture(autouse=True)
def empty_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def write(url: str, content: str) -> str:
    with fsspec.open(url, "w") as file:
        file.write(content)
    return url


def folder(path: Path, **files: str) -> Path:
    path.mkdir()
    for name, content in files.items():
        (path / name).write_text(content)
    return path


def stored(url: str) -> dict[str, bytes]:
    place = Place(url)
    return {name: place.read(name) for name in place.files()}


@pytest.mark.parametrize("name", ["s3://bucket/a", "memory://a", "file:///a", "hf://datasets/a/b.csv"])
def test_a_url_has_a_scheme(name: str) -> None:
    assert is_url(name)


@pytest.mark.parametrize("name", ["C://data", r"C:\data", "org/name", "/a/b", "a//b", "./s3:/bucket"])
def test_a_path_is_no_url_and_stays_as_it_is(name: str) -> None:
    assert not is_url(name)
    assert local_folder(name) == name


def test_a_file_is_fetched_under_its_name_and_again_when_it_has_changed() -> None:
    url = write("memory://data/a.txt", "one")
    first = fetch(url)
    assert (first.name, first.read_text()) == ("a.txt", "one")
    assert fetch(url) == first
    write(url, "two")  # of the same size
    assert fetch(url).read_text() == "two"
    assert first.read_text() == "one"  # whoever reads it may go on


def test_a_folder_comes_with_what_is_below_it_and_nothing_beside_it() -> None:
    write("memory://m/model/config.json", "{}")
    write("memory://m/model/deep/x.txt", "")
    write("memory://m/model2/other.txt", "other")
    copy = fetch("memory://m/model/")
    assert copy.name == "model"
    assert {str(path.relative_to(copy)) for path in copy.rglob("*")} == {"config.json", "deep", "deep/x.txt"}


def test_many_at_once_fetch_once_and_none_sees_half_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        write(f"memory://m/{name}", name * 1000)
    calls: list[Path] = []
    get = Place.get

    def slowly(place: Place, files: Mapping[str, Any], target: Path) -> None:
        calls.append(target)
        for name, facts in files.items():
            time.sleep(0.05)
            get(place, {name: facts}, target)

    monkeypatch.setattr(Place, "get", slowly)
    with ThreadPoolExecutor(6) as pool:
        copies = list(pool.map(lambda _: (path := fetch("memory://m"), len(list(path.iterdir()))), range(6)))
    assert len(calls) == 1
    assert {count for _, count in copies} == {3}


def test_what_was_interrupted_is_fetched_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    url = write("memory://m/a.txt", "whole")

    def fails(place: Place, files: Mapping[str, Any], target: Path) -> None:
        target.parent.mkdir(parents=True)
        target.write_text("wh")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Place, "get", fails)
        with pytest.raises(KeyboardInterrupt):
            fetch(url)
    assert fetch(url).read_text() == "whole"


def test_what_changes_while_it_is_fetched_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    url = write("memory://m/a.txt", "one")
    get = Place.get

    def meanwhile(place: Place, files: Mapping[str, Any], target: Path) -> None:
        get(place, files, target)
        write("memory://m/a.txt", "two")

    with monkeypatch.context() as patch:
        patch.setattr(Place, "get", meanwhile)
        with pytest.raises(StorageError, match=r"^memory://m/a\.txt has changed while it was fetched"):
            fetch(url)
    assert fetch(url).read_text() == "two"


def test_a_file_is_no_folder() -> None:
    with pytest.raises(StorageError, match=r"^memory://m/a\.txt is a file, and a folder is needed here$"):
        local_folder(write("memory://m/a.txt", "one"))


def test_a_folder_is_put_with_its_last_file_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder(tmp_path / "model", a="1", config="2", z="3")
    order: list[str] = []
    put = MemoryFileSystem.put_file
    monkeypatch.setattr(MemoryFileSystem, "put_file", lambda *args, **_: (order.append(args[2]), put(*args[:3])))
    put_folder(source, "memory://out/model", last="config")
    assert order[-1] == "/out/model/config"
    assert stored("memory://out/model") == {"a": b"1", "config": b"2", "z": b"3"}


def test_whoever_finds_the_last_file_finds_nothing_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder(tmp_path / "model", a="1", config="2")
    put_folder(source, "memory://out/model", last="config")
    (source / "a").write_text("new")

    def breaks(*_: object, **__: object) -> None:
        raise OSError("connection lost")

    monkeypatch.setattr(MemoryFileSystem, "put_file", breaks)
    with pytest.raises(StorageError, match="memory://out/model cannot be written: connection lost"):
        put_folder(source, "memory://out/model", last="config")
    assert stored("memory://out/model") == {"a": b"1"}


def test_nothing_of_others_is_mixed_or_deleted(tmp_path: Path) -> None:
    write("memory://out/thesis.tex", "years")
    with pytest.raises(StorageError, match=r"memory://out holds other files \(thesis.tex\); name another folder"):
        put_folder(folder(tmp_path / "model", a="1"), "memory://out")
    assert stored("memory://out") == {"thesis.tex": b"years"}


def test_a_folder_of_this_machine_may_be_named_by_url(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/there/model"
    assert not exists(url)
    put_folder(folder(tmp_path / "model", a="1"), url)
    assert exists(url)
    assert (fetch(url) / "a").read_text() == "1"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://KEY:se/cr+et@bucket/a.jsonl", "s3://bucket/a.jsonl"),
        ("ftp://me:pass-word@host/a.jsonl", "ftp://host/a.jsonl"),
        ("https://host/a.jsonl?X-Amz-Signature=secret", "https://host/a.jsonl"),
    ],
)
def test_credentials_in_a_url_are_refused_and_not_shown(url: str, shown: str) -> None:
    with pytest.raises(StorageError, match="leave them to the environment") as caught:
        fetch(url)
    assert f"the URL of {shown} has" in str(caught.value)
    assert not any(word in str(caught.value) for word in ("KEY", "cr+et", "pass-word", "secret"))


@pytest.mark.parametrize("url", ["http://host:8080/user@host.txt", "abfs://container@account.dfs.core/a.txt"])
def test_an_at_sign_is_no_password(url: str) -> None:
    storage.refuse_secrets(url)


def test_mistakes_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {
        "memory://none/a.txt": "memory://none/a.txt does not exist, or cannot be seen with these credentials",
        "nosuch://a/b.txt": "nosuch://a/b.txt: Protocol not known: nosuch",
        "gs://bucket/a.txt": "gs:// cannot be used yet: Please install gcsfs to access Google Storage",
    }
    for url, sentence in cases.items():
        with pytest.raises(StorageError, match=sentence) as caught:
            fetch(url)
        assert caught.value.exit_code == 2
        assert isinstance(caught.value, CollieError)


def test_the_package_for_s3_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(import_module("fsspec.registry")._registry, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(StorageError, match=r"^s3:// cannot be used yet: .*s3fs.*; pip install 'collie-core\[s3\]'$"):
        fetch("s3://bucket/a.txt")


def test_a_name_that_leads_out_of_its_folder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    listing = {"/m/../../etc/passwd": {"size": 1, "created": 1}}  # a bucket can hold such a name
    monkeypatch.setattr(MemoryFileSystem, "find", lambda *_, **__: listing)
    with pytest.raises(StorageError, match=r"holds \.\./\.\./etc/passwd, which would lie outside"):
        fetch("memory://m")


def test_a_server_that_does_not_tell_of_changes_is_refused() -> None:
    with pytest.raises(StorageError, match="tells neither a checksum nor a time of the file"):
        storage._version("http://host/a.txt", {"": {"size": 3}})


# -- data -----------------------------------------------------------------------------------------------------------


def rows(url: str, split: str | None = None) -> list[Any]:
    return [dict(row.values) for row in Source(SourceConfig(path=url, split=split)).rows()]


def test_every_kind_of_file_is_read_by_url(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    table = [{"text": "a"}, {"text": "b"}]
    write("memory://d/x.jsonl", "\n".join(map(json.dumps, table)))
    write("memory://d/x.json", json.dumps(table))
    write("memory://d/x.csv", "text\na\nb\n")
    write("memory://d/x.txt", "a\nb\n")
    parquet.write_table(pa.Table.from_pylist(table), tmp_path / "x.parquet")
    fsspec.filesystem("memory").put_file(str(tmp_path / "x.parquet"), "/d/x.parquet")
    for suffix in ("jsonl", "json", "csv", "txt", "parquet"):
        assert rows(f"memory://d/x.{suffix}") == table, suffix
    assert rows("memory://d/x.jsonl", "train[1:]") == table[1:]


def test_mistakes_in_data_are_told_with_the_url() -> None:
    write("memory://d/x.jsonl", '{"text": "a"}\n{"text": }\n')
    with pytest.raises(DataError, match=r"^memory://d/x.jsonl:2:10: this is not JSON"):
        rows("memory://d/x.jsonl")
    with pytest.raises(DataError, match=r"^memory://d/x.doc: unknown kind of file '.doc'"):
        rows("memory://d/x.doc")


def test_changed_data_has_another_identity_and_refetched_data_has_not(tmp_path: Path) -> None:
    source = SourceConfig(path=write("memory://d/x.txt", "a"))
    first = Source(source).identity()
    (tmp_path / "cache").rename(tmp_path / "elsewhere")
    assert Source(source).identity() == first
    write("memory://d/x.txt", "b")
    assert Source(source).identity() != first
