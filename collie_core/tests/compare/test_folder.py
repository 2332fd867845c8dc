"""Whose folder it is: one comparison, of one configuration, in one process at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
from compared import asked

from collie_core.compare.folder import Folder
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
