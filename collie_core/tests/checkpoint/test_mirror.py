"""Checkpoints in a store: whole or not listed, proved by their manifest, deleted in order. The store is in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from collie_core.checkpoint import files
from collie_core.checkpoint.files import CheckpointError
from collie_core.checkpoint.mirror import Mirror
from collie_core.cli import main
from collie_core.storage import StorageError

URL = "memory://runs/one/checkpoints"


@pytest.fixture(autouse=True)
def empty_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def checkpoint(parent: Path, step: int, content: str = "state") -> Path:
    beside = files.begin(parent, step)
    (beside / files.MODEL).mkdir()
    (beside / files.MODEL / "model.safetensors").write_text(content)
    (beside / files.STATES).write_text(content * step)
    (beside / files.TRAINER).write_text("{}")
    return files.commit(beside, step)


@pytest.fixture
def mirror(tmp_path: Path) -> Mirror:
    """With the checkpoints of steps 1 to 3."""
    found = Mirror(URL)
    for step in (1, 2, 3):
        assert found.put(checkpoint(tmp_path / "local", step)) == f"{URL}/step-0000000{step}"
    return found


def remote(step: int, name: str) -> str:
    return f"/runs/one/checkpoints/{files.folder_name(step)}/{name}"


def flip(step: int, name: str) -> None:
    held = MemoryFileSystem.store[remote(step, name)]
    held.seek(0)
    held.write(b"X")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_was_put_comes_back_byte_for_byte(mirror: Mirror, tmp_path: Path) -> None:
    assert mirror.steps() == [3, 2, 1]
    copy = mirror.get(2, tmp_path / "elsewhere")
    assert copy == tmp_path / "elsewhere" / "step-00000002"
    assert contents(copy) == contents(tmp_path / "local" / "step-00000002")
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == [copy.name]


def test_a_sound_copy_is_not_fetched_again_and_a_damaged_one_is(
    mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = tmp_path / "local" / "step-00000002"
    before = contents(local)
    (local / files.TRAINER).write_text("[]")
    assert contents(mirror.get(2, tmp_path / "local")) == before
    monkeypatch.setattr(MemoryFileSystem, "get_file", None)
    mirror.get(2, tmp_path / "local")


def test_one_step_put_twice_is_the_second(mirror: Mirror, tmp_path: Path) -> None:
    again = checkpoint(tmp_path / "again", 2, "other")
    mirror.put(again)
    assert contents(mirror.get(2, tmp_path / "elsewhere")) == contents(again)


@pytest.mark.parametrize("whole_files", [0, 1, 2, 3])
def test_an_interrupted_upload_is_not_a_checkpoint(
    mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole_files: int
) -> None:
    put, left = MemoryFileSystem.put_file, iter(range(whole_files))

    def breaks(*args: object, **_: object) -> None:
        if next(left, None) is None:
            raise OSError("connection lost")
        put(*args[:3])

    fourth = checkpoint(tmp_path / "local", 4)
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "put_file", breaks)
        with pytest.raises(StorageError, match="step-00000004 cannot be written: connection lost"):
            mirror.put(fourth)
    assert mirror.steps() == [3, 2, 1]
    with pytest.raises(CheckpointError, match=f"^{URL}/step-00000004 has no manifest.json"):
        mirror.get(4, tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists() or not list((tmp_path / "elsewhere").iterdir())
    assert mirror.remove_leftovers() == ([4] if whole_files else [])
    mirror.put(fourth)
    assert mirror.steps() == [4, 3, 2, 1]


def test_a_deletion_begins_with_the_manifest(mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    remove = MemoryFileSystem.rm_file

    def watched(system: MemoryFileSystem, path: str) -> None:
        order.append(path)
        remove(system, path)

    monkeypatch.setattr(MemoryFileSystem, "rm_file", watched)
    mirror.remove(2)
    assert order[0] == remote(2, files.MANIFEST)
    assert len(order) == 4
    assert mirror.steps() == [3, 1]
    assert not any("step-00000002" in name for name in MemoryFileSystem.store)


@pytest.mark.parametrize("damaged", [files.STATES, "model/model.safetensors", files.MANIFEST])
def test_a_flipped_byte_is_told_and_such_a_checkpoint_is_never_taken(
    mirror: Mirror, tmp_path: Path, damaged: str
) -> None:
    flip(3, damaged)
    for use in (mirror.verify, lambda step: mirror.get(step, tmp_path / "elsewhere")):
        with pytest.raises(CheckpointError, match=f"^{URL}/step-00000003.*damaged") as caught:
            use(3)
        assert damaged in str(caught.value)
    assert not list((tmp_path / "elsewhere").glob("*"))
    assert mirror.verify(2).step == 2


def test_missing_and_added_files_are_told(mirror: Mirror) -> None:
    MemoryFileSystem.store[remote(3, "extra")] = MemoryFileSystem.store[remote(3, files.STATES)]
    with pytest.raises(CheckpointError, match="extra does not belong to it"):
        mirror.verify(3)
    del MemoryFileSystem.store[remote(2, files.STATES)]
    with pytest.raises(CheckpointError, match=f"{files.STATES} is missing"):
        mirror.verify(2)


def test_pruning_keeps_the_newest_and_the_spared(mirror: Mirror) -> None:
    assert mirror.prune(1, spare=1) == [2]
    assert mirror.steps() == [3, 1]


def test_pruning_thoroughly_never_deletes_the_last_sound_one(mirror: Mirror) -> None:
    flip(3, files.STATES)
    assert mirror.prune(1, thorough=True) == [1]
    assert mirror.steps() == [3, 2]


def test_the_verb_works_on_urls(mirror: Mirror, capsys: pytest.CaptureFixture[str]) -> None:
    flip(2, files.STATES)
    del MemoryFileSystem.store[remote(1, files.MANIFEST)]
    assert main(["checkpoint", "list", "memory://runs/one"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["step-00000002", "step-00000003"]
    assert main(["checkpoint", "verify", URL]) == 1
    bad, good = capsys.readouterr().out.splitlines()
    assert f"{URL}/step-00000002 is damaged: {files.STATES}" in bad
    assert good.endswith("sound")
    assert main(["checkpoint", "verify", mirror.url_of(3)]) == 0
    assert main(["checkpoint", "prune", URL]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["deleted step-00000001", "deleted step-00000002"]
    assert main(["checkpoint", "list", "memory://runs/two"]) == 1
    assert capsys.readouterr().err == "memory://runs/two holds no checkpoint\n"
