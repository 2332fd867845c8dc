"""Taking the run directory and describing what ran."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_runs import CONFIG, make_run, play

from collie_core.errors import RunError
from collie_core.report.html import HtmlReport
from collie_core.report.metrics import MetricsFile
from collie_core.report.rundir import (
    environment,
    git_state,
    prepare_run_directory,
    redacted,
    refuse_used_directory,
)

TABLE = [{"kind": "model", "name": "llama", "distribution": "collie-llama", "version": "0.1.0", "value": "x:y"}]


def config_for(folder: Path, *, overwrite: bool = False) -> Any:
    config: Any = make_run(folder).config
    config.train.overwrite_output_dir = overwrite
    return config


def test_writes_what_ran(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "demo"
    assert prepare_run_directory(config_for(folder), TABLE) == folder
    assert (folder / "config.yaml").read_text().endswith(CONFIG)
    assert json.loads((folder / "plugins.json").read_text()) == TABLE
    assert json.loads((folder / "environment.json").read_text())["packages"]["collie-core"]


def test_packages_are_those_that_python_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place, number in (("first", "2.0"), ("second", "1.0")):
        folder = tmp_path / place / f"acme_words-{number}.dist-info"
        folder.mkdir(parents=True)
        text = f"Metadata-Version: 2.1\nName: Acme.words\nVersion: {number}\n\nName: readme\nVersion: 9\n"
        (folder / "METADATA").write_text(text)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "first"), str(tmp_path / "second"), *sys.path])
    found = environment()["packages"]
    assert found["Acme.words"] == "2.0"
    assert "readme" not in found
    assert list(found) == sorted(found, key=str.lower)


def test_checking_changes_nothing(tmp_path: Path) -> None:
    refuse_used_directory(config_for(tmp_path / "new"))
    assert not list(tmp_path.iterdir())


def test_a_folder_with_other_files_is_fine(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    prepare_run_directory(config_for(tmp_path), TABLE)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml"])
def test_a_folder_with_a_run_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("x")
    with pytest.raises(RunError, match=rf"{name}.*overwrite_output_dir=true"):
        prepare_run_directory(config_for(tmp_path), TABLE)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_overwriting_removes_only_what_collie_wrote(tmp_path: Path) -> None:
    prepare_run_directory(config_for(tmp_path), TABLE)
    play([HtmlReport(), MetricsFile()], make_run(tmp_path))
    for name in (
        "model/model.safetensors",
        "model/config.json",
        "model/tokenizer.json",
        "best/best.json",
        "best/adapter_model.safetensors",
        "metrics.csv",
        "checkpoints/step-00000100/state",
        "tensorboard/events.out.tfevents.1.host.2.0",
        "notes.txt",
        "model/notes.txt",
        "tensorboard/notes.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    prepare_run_directory(config_for(tmp_path, overwrite=True), TABLE)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {
        "config.yaml",
        "plugins.json",
        "environment.json",
        "notes.txt",
        "model/notes.txt",
        "tensorboard/notes.txt",
    }
    assert not (tmp_path / "checkpoints").exists()
    assert not (tmp_path / "best").exists()


def test_overwriting_spares_a_config_that_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: mine\n")
    with pytest.raises(RunError, match="not written by CoLLiE"):
        prepare_run_directory(config_for(tmp_path, overwrite=True), TABLE)
    assert (tmp_path / "config.yaml").read_text() == "model: mine\n"


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("x")
    with pytest.raises(RunError, match="is a file"):
        prepare_run_directory(config_for(tmp_path / "run"), TABLE)
    with pytest.raises(RunError, match="cannot be written"):
        prepare_run_directory(config_for(tmp_path / "run" / "below"), TABLE)


def test_environment_holds_no_variables_and_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    monkeypatch.setattr(sys, "argv", ["collie", "train", "server.token=hf_abcdefgh"])
    written = json.dumps(environment())
    assert "hf_abcdefgh" not in written
    assert "server.token=***" in written


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "optimizer.lr=1e-4"], ["train", "optimizer.lr=1e-4"]),
        (["--server.api_key=abc", "x"], ["--server.api_key=***", "x"]),
        (["--hub-token", "abc", "x"], ["--hub-token", "***", "x"]),
        (["data.train=https://me:pw@host/a.jsonl"], ["data.train=https://***@host/a.jsonl"]),
        (
            ["tokenizer=x", "train.max_tokens=3", "What is a token"],
            ["tokenizer=x", "train.max_tokens=3", "What is a token"],
        ),
    ],
)
def test_secrets_in_the_command_line_are_masked(arguments: list[str], expected: list[str]) -> None:
    assert list(redacted(arguments)) == expected


def test_git_state_is_commit_and_changes(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-q")
    assert git_state(tmp_path) is None  # no commit yet
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-qm", "x")
    state = git_state(tmp_path)
    assert state is not None
    assert len(state["commit"]) == 40
    assert state["changed"] is False
    (tmp_path / "a").write_text("2")
    assert git_state(tmp_path) == state | {"changed": True}


def test_no_git_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(tmp_path) is None
