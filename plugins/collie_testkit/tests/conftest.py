"""Installs the mutants for these tests."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from collie_testkit.registry import KINDS, checks_of

MUTANTS = Path(__file__).parent / "mutants"
HEADER = "Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nSummary: broken on purpose\n"


@pytest.fixture(scope="session")
def mutants(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The plugins of `mutants/` by the names that the checks have for them, installed here and for ranks."""
    site = tmp_path_factory.mktemp("mutants")
    lines = []
    for kind in KINDS:
        module = f"collie_mutants.{kind}s"
        lines += [f"[collie.{kind}]"]
        lines += [_entry(module, check.mutant) for check in checks_of(kind) if kind == "optimizer" or check.kinds]
    _install(site, "collie-mutants", [line for line in lines if "boundless" not in line], "collie-core>=0.1,<1")
    _install(site, "collie-boundless", ["[collie.optimizer]", _entry("collie_mutants.optimizers", "boundless")], "")
    sys.path[:0] = [str(site), str(MUTANTS)]
    importlib.invalidate_caches()
    yield
    del sys.path[:2]


def _entry(module: str, mutant: str) -> str:
    module = "collie_mutants.heavy" if mutant == "heavy" else module
    return f"{mutant} = {module}:{mutant.upper().replace('-', '_')}"


def _install(site: Path, name: str, entry_points: list[str], requires: str) -> None:
    info = site / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    required = f"Requires-Dist: {requires}\n" if requires else ""
    (info / "METADATA").write_text(HEADER.format(name=name) + required)
    (info / "entry_points.txt").write_text("\n".join(entry_points))
