"""The shape of the code base: how far it is from the YAML to `optimizer.step()`, and how long the loop is."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import safetensors
import tomllib
import torch
import transformers
import yaml
from packaging.requirements import Requirement
from yaml.composer import Composer

from collie_core import __version__
from collie_core.api import RunConfig, Trainer
from collie_core.cli import main

ROOT = Path(__file__).resolve().parent.parent
MOST_FILES, MOST_FRAMES, LONGEST_LOOP = 12, 4, 300


class Reached(Exception):
    """The first `optimizer.step()` was called."""


def our_frames() -> list[tuple[str, str]]:
    """(file, function) of ours on the stack, innermost first; comprehensions are part of their function."""
    found: list[tuple[str, str]] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if "/src/collie_" in code.co_filename and not code.co_name.startswith("<"):
            found.append((code.co_filename.partition("/src/")[2], code.co_name))
        frame = frame.f_back
    return found


@pytest.fixture
def run_file(tiny_llama: Path, instructions: Path, tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    sections = {
        "model": {"model_name_or_path": str(tiny_llama)},
        "data": {"train": str(instructions), "cache_dir": str(tmp_path / "cache")},
        "train": {"max_steps": 1, "output_dir": str(tmp_path / "run")},
    }
    path.write_text(yaml.safe_dump(sections))
    return path


@pytest.fixture
def stacks(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[str, str]]]:
    """Our frames above each piece of real work, the first time a library is asked for it."""
    seen: dict[str, list[tuple[str, str]]] = {}

    def watch(owner: Any, name: str, label: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def watched(*args: Any, **options: Any) -> Any:
            seen.setdefault(label, our_frames())
            if label == "optimizer.step":
                raise Reached
            return original(*args, **options)

        monkeypatch.setattr(owner, name, watched)

    watch(Composer, "compose_document", "read the YAML")
    watch(transformers.AutoModelForCausalLM, "from_config", "build the model")
    watch(safetensors, "safe_open", "read the weights")
    watch(transformers.PreTrainedTokenizerBase, "__call__", "tokenise")
    watch(torch.optim.AdamW, "__init__", "build the optimizer")
    watch(torch, "from_numpy", "collate a batch")
    watch(transformers.LlamaForCausalLM, "forward", "forward")
    watch(torch.Tensor, "backward", "backward")
    watch(torch.optim.AdamW, "step", "optimizer.step")
    return seen


def test_few_files_lead_from_the_yaml_to_the_step(run_file: Path, stacks: dict[str, list[tuple[str, str]]]) -> None:
    """Every file that a library was called from or through: what one opens to follow a run."""
    with pytest.raises(Reached):
        Trainer(RunConfig.from_yaml(run_file), observers=()).train()
    assert len(stacks) == 9, "something was not watched"
    opened = {file for frames in stacks.values() for file, _ in frames}
    assert len(opened) <= MOST_FILES, "\n".join(sorted(opened))


def test_few_frames_stand_above_the_step(run_file: Path, stacks: dict[str, list[tuple[str, str]]]) -> None:
    with pytest.raises(Reached):
        main(["train", str(run_file)])
    assert len(stacks["optimizer.step"]) <= MOST_FRAMES, stacks["optimizer.step"]


def test_the_loop_is_short_and_packs_import_only_the_api() -> None:
    loop = ROOT / "collie_core" / "src" / "collie_core" / "loop.py"
    assert len(loop.read_text().splitlines()) < LONGEST_LOOP
    for file in [*ROOT.glob("collie_[!c]*/src/**/*.py"), *ROOT.glob("plugins/*/src/**/*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("collie_core"):
                assert node.module == "collie_core.api", file
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("collie_core") for alias in node.names), file


def test_the_core_imports_no_pack() -> None:
    for file in (ROOT / "collie_core" / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            packs = (
                "collie_gemma",
                "collie_glm",
                "collie_internlm",
                "collie_llama",
                "collie_metrics",
                "collie_moss",
                "collie_normuon",
                "collie_optim",
                "collie_peft",
                "collie_qwen",
                "collie_server",
                "collie_testkit",
            )
            assert not any(name.startswith(packs) for name in names), file


def test_each_version_is_in_its_changelog_and_meets_the_bounds_of_the_others() -> None:
    files = [ROOT / "pyproject.toml", *ROOT.glob("collie_*/pyproject.toml"), *ROOT.glob("plugins/*/pyproject.toml")]
    projects = {file: tomllib.loads(file.read_text())["project"] for file in files}
    versions = {project["name"]: project["version"] for project in projects.values()}
    assert versions["collie-core"] == __version__
    index = (ROOT / "CHANGELOG.md").read_text()
    for file, project in projects.items():
        changelog = file.with_name("CHANGELOG.md")
        newest = re.search(r"^## (\S+) \((unreleased|\d{4}-\d{2}-\d{2})\)$", changelog.read_text(), re.MULTILINE)
        assert newest is not None, changelog
        assert newest[1] == project["version"], changelog
        if file.parent != ROOT:
            assert f"({changelog.relative_to(ROOT)})" in index, changelog
            assert "(CHANGELOG.md)" in file.with_name("README.md").read_text(), file
        for requirement in map(Requirement, project["dependencies"]):
            if requirement.name.startswith("collie-"):
                assert requirement.specifier.contains(versions[requirement.name]), f"{file}: {requirement}"
                assert {bound.operator for bound in requirement.specifier} == {">=", "<"}, f"{file}: {requirement}"
