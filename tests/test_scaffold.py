"""`collie plugins new`: what it writes is built, installed and passes its checks; a newcomer's family too."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from collie_core.api import PluginError, Plugins
from collie_core.cli import main
from collie_core.scaffold import KINDS, write_package
from collie_testkit.context import Context, Shared
from collie_testkit.results import FAILED, checks_for, run_check

MOST_FILES, MOST_LINES = 5, 60
HAND_WRITTEN: list[str] = []  # at most 40 lines: OLMo 2 needs none


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One new package of each kind, by its name, and OLMo 2."""
    folder = tmp_path_factory.mktemp("new")
    wanted = {f"my-{kind}": kind for kind in KINDS} | {"olmo2": "model"}
    for name, kind in wanted.items():
        assert main(["plugins", "new", kind, name, "--output", str(folder / name)]) == 0
    return {name: folder / name for name in wanted}


@pytest.fixture(scope="module")
def site(packages: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder on the path into which pip has built and installed all of them."""
    root = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "--target", str(root), *map(str, packages.values())], check=True)
    sys.path.insert(0, str(root))
    importlib.invalidate_caches()
    yield root
    sys.path.remove(str(root))


def test_it_is_short(packages: dict[str, Path]) -> None:
    for name, folder in packages.items():
        files = [path for path in folder.rglob("*") if path.is_file()]
        lines = [line for path in files for line in path.read_text().splitlines()]
        assert len(files) <= MOST_FILES, name
        assert len(lines) <= MOST_LINES, name
        assert "$" not in "".join(lines), "a word of a template was left"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_it_passes_its_checks_as_written(kind: str, site: Path, tmp_path: Path, zygote: Any) -> None:
    outcomes = run(kind, f"my-{kind}", 1, tmp_path, zygote)
    assert set(outcomes.values()) <= {"passed", "skipped"}, outcomes
    assert Plugins.discover().find(kind, f"my-{kind}").value == f"collie_my_{kind}:COMPONENT"
    assert str(site) in str(importlib.import_module(f"collie_my_{kind}").__file__)


def test_a_newcomer_has_a_family_on_several_processes(
    packages: dict[str, Path], site: Path, tmp_path: Path, zygote: Any
) -> None:
    assert len(HAND_WRITTEN) <= 40
    outcomes = run("model", "olmo2", 2, tmp_path, zygote)
    assert outcomes["tp2"] == outcomes["pp2"] == outcomes["meshes"] == outcomes["training"] == "passed", outcomes
    assert FAILED not in outcomes.values()


def run(kind: str, name: str, level: int, folder: Path, zygote: Any) -> dict[str, str]:
    """How each check up to a level ended; with why it failed."""
    plugins, shared = Plugins.discover(), Shared(folder / "shared")
    shared.folder.mkdir()
    found = {}
    for check in checks_for(plugins, kind, name):
        if check.level <= level:
            own = folder / check.name
            own.mkdir()
            result = run_check(check, Context(kind, name, own, lambda: zygote, plugins=plugins, shared=shared))
            found[check.name] = result.outcome if result.outcome != FAILED else f"{FAILED}: {result.reason}"
    return found


def test_the_verb_says_the_same(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "metric", "my-metric", "--level", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["failed"] == 0
    assert {row["check"] for row in found["checks"] if row["outcome"] == "passed"} >= {"metadata", "splits", "merge"}
    assert main(["check", "metric", "my-metric", "--level", "1", "--known", "splits=never tried"]) == 1
    said = capsys.readouterr().out
    assert "passes, though it is a known failure (never tried)" in said
    assert "metric my-metric: 1 of 13 checks failed." in said


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    for name in ("", "a b", "9", "-a", "a-", "../a", "a/b", "ä"):
        with pytest.raises(PluginError, match="cannot name a plugin: use letters, digits and - between them"):
            write_package("metric", name, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "own.txt").write_text("mine")
    with pytest.raises(PluginError, match="exists already and is not empty; choose another folder with --output"):
        write_package("metric", "a", tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["own.txt"]
