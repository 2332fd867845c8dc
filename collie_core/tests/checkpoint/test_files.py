"""Folders of checkpoints: what counts as one, what is found out, what is deleted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from collie_core.checkpoint import files
from collie_core.checkpoint.files import CheckpointError
from collie_core.cli import main


def write(parent: Path, step: int) -> Path:
    beside = files.begin(parent, step)
    (beside / "model").mkdir()
    for name in (files.TRAINER, files.STATES, "model/config.json"):
        (beside / name).write_text(f"{name} of step {step}, long enough to be damaged")
    return files.commit(beside, step)


def edit_manifest(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / files.MANIFEST
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def test_it_appears_whole_and_says_what_it_is(tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoints", 7)
    assert folder.name == "step-00000007"
    manifest = files.verify(folder)
    assert manifest.step == 7
    assert set(manifest.files) == {files.TRAINER, files.STATES, "model/config.json"}
    assert manifest.nbytes == sum(size for size, _ in manifest.files.values()) > 0
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize(
    ("damage", "because"),
    [
        (lambda folder: (folder / files.MANIFEST).unlink(), "has no manifest"),
        (lambda folder: (folder / files.MANIFEST).write_text("{"), "manifest.json is damaged"),
        (lambda folder: (folder / files.MANIFEST).write_text("[]"), "manifest.json is damaged"),
        (lambda folder: (folder / files.STATES).unlink(), "optimizer.safetensors is missing"),
        (lambda folder: (folder / "model" / "config.json").write_text("{}"), "model/config.json has 2 of"),
        (lambda folder: (folder / "more").write_text(""), "more does not belong"),
        (lambda folder: edit_manifest(folder, lambda found: found.update(format=2)), "has the format 2"),
        (lambda folder: edit_manifest(folder, lambda found: found.update(step=8)), "is that of step 8"),
        (lambda folder: edit_manifest(folder, lambda found: found["files"].pop(files.STATES)), "does not belong"),
        (
            lambda folder: edit_manifest(folder, lambda found: found["files"].update({"../x": {}})),
            "manifest.json is damaged",
        ),
    ],
)
def test_damage_is_found(damage: Callable[[Path], object], because: str, tmp_path: Path) -> None:
    folder = write(tmp_path, 7)
    damage(folder)
    with pytest.raises(CheckpointError, match=because):
        files.verify(folder)


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    folder = write(tmp_path, 7)
    values = bytearray((folder / files.STATES).read_bytes())
    values[5] ^= 1
    (folder / files.STATES).write_bytes(values)
    with pytest.raises(CheckpointError, match="not what was written"):
        files.verify(folder)


def test_a_manifest_that_points_out_of_its_folder_opens_nothing(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", 7)
    (tmp_path / "run" / "secret").write_text("x")
    entry = {"bytes": 1, "sha256": files.digest(tmp_path / "run" / "secret")}
    edit_manifest(folder, lambda found: found["files"].update({"../secret": entry}))
    with pytest.raises(CheckpointError, match=r"\.\./secret is missing"):
        files.verify(folder)


def test_the_newest_sound_ones_stay(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        write(tmp_path, step)
    (tmp_path / "step-00000008" / files.MANIFEST).unlink()
    (tmp_path / ".step-00000010.new").mkdir()
    (tmp_path / "step-of-mine").mkdir()
    assert [path.name for path in files.prune(tmp_path, 1)] == ["step-00000004", "step-00000002"]
    assert [files.step_of(path) for path in files.checkpoints_in(tmp_path)] == [8, 6]
    assert [path.name for path in files.remove_leftovers(tmp_path)] == [".step-00000010.new"]
    assert (tmp_path / "step-of-mine").is_dir()


def test_one_can_be_written_again(tmp_path: Path) -> None:
    (write(tmp_path, 2) / files.STATES).write_text("damaged")
    files.verify(write(tmp_path, 2))
    assert len(list(tmp_path.iterdir())) == 1


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (2, 4, 6):
        write(tmp_path / "checkpoints", step)
    assert main(["checkpoint", "list", str(tmp_path)]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        f"step-0000000{step}" for step in (2, 4, 6)
    ]
    assert main(["checkpoint", "verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("sound") == 3
    newest = tmp_path / "checkpoints" / "step-00000006"
    (newest / files.TRAINER).write_text("{}")
    assert main(["checkpoint", "verify", str(newest)]) == 1
    assert "trainer.json has 2 of" in capsys.readouterr().out
    assert main(["checkpoint", "prune", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == ["deleted step-00000002"]
    assert main(["checkpoint", "prune", str(tmp_path), "--keep", "0"]) == 1
    assert main(["checkpoint", "prune", str(newest)]) == 1
    assert main(["checkpoint", "list", str(tmp_path / "nothing")]) == 1
    assert "holds no checkpoint" in capsys.readouterr().err
