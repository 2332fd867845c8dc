"""Whose folder it is: one comparison, of one configuration, in one process at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
from compared import asked

from collie_core.compare.folder import Folder, read, write_whole
from collie_core.compare.grid import Grid
from collie_core.errors import RunError


def test_more_cells_of_the_same_configuration_may_come(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "compared")
    with folder.taken(Grid.of(asked(tmp_path))):
        pass
    with folder.taken(Grid.of(asked(tmp_path, optimizers=["sgd"], rates={"": [1.0]}))):
        pass


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_steps=9", "train.max_steps is 3 there and 9 here"),
        ("optimizer.weight_decay=0.1", r'overrides is \[\] there and \["optimizer.weight_decay=0.1"\] here'),
    ],
)
def test_another_configuration_is_refused(tmp_path: Path, override: str, message: str) -> None:
    folder = Folder(tmp_path / "compared")
    with folder.taken(Grid.of(asked(tmp_path))):
        pass
    with pytest.raises(RunError, match=message), folder.taken(Grid.of(asked(tmp_path, [override]))):
        pass


def test_two_processes_do_not_work_in_one_folder(tmp_path: Path) -> None:
    grid = Grid.of(asked(tmp_path))
    first, second = Folder(tmp_path / "compared"), Folder(tmp_path / "compared")
    with first.taken(grid), pytest.raises(RunError, match="another process"), second.taken(grid):
        pass
    with second.taken(grid):
        pass


@pytest.mark.parametrize("place", ["/dev/null/compared", "/proc/compared"])
def test_a_folder_that_cannot_be_written_is_said_in_a_sentence(tmp_path: Path, place: str) -> None:
    with pytest.raises(RunError, match=f"{place} cannot be written: .*name another --output"):
        Folder(Path(place)).taken(Grid.of(asked(tmp_path))).__enter__()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no disk that is always full")
def test_a_full_disk_is_said_in_a_sentence_and_what_stood_stands(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    write_whole(report, {"whole": True})
    (tmp_path / ".report.json.new").symlink_to("/dev/full")
    with pytest.raises(RunError, match=r"report\.json cannot be written: No space left on device"):
        write_whole(report, {"whole": False})
    assert read(report) == {"whole": True}


@pytest.mark.parametrize("is_file", [True, False])
def test_what_is_not_a_comparison_stays_as_it_is(tmp_path: Path, is_file: bool) -> None:
    target = tmp_path / "compared"
    if is_file:
        target.write_text("mine")
    else:
        target.mkdir()
        (target / "mine").write_text("")
    with pytest.raises(RunError, match="in use"), Folder(target).taken(Grid.of(asked(tmp_path))):
        pass
    assert is_file or [path.name for path in target.iterdir()] == ["mine"]
