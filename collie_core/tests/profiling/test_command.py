"""`collie profile` as a command, without a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from collie_core.cli.profile import _clear
from collie_core.errors import RunError


def test_nothing_of_an_earlier_profile_is_left_and_everything_else_is(tmp_path: Path) -> None:
    for name in ("trace-rank-0.json.gz", "trace-rank-7.json.gz", "profile.json", "notes.txt"):
        (tmp_path / name).write_text("old")
    _clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    _clear(tmp_path / "new" / "one")
    assert (tmp_path / "new" / "one").is_dir()


def test_a_folder_that_cannot_be_written_is_said_before_anything_runs() -> None:
    with pytest.raises(RunError, match=r"/dev/null/x cannot be written: .*; name another --output"):
        _clear(Path("/dev/null/x"))
