"""Settings for every test: the packages, no network, one thread, and where the real data lies when it is there."""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parent
REAL_DATA = ROOT.parent / "shared" / "data"

# With --import-mode=importlib, `collie_core/tests/test_x.py` is the module `collie_core.tests.test_x`, and pytest makes
# a namespace package out of the folder `collie_core/` unless that name is already imported.
for pyproject in sorted(ROOT.glob("*/pyproject.toml")):
    if find_spec(pyproject.parent.name) is not None:  # a distribution can be tested without the others
        import_module(pyproject.parent.name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `real` are skipped where their data is not."""
    if REAL_DATA.is_dir():
        return
    skip = pytest.mark.skip(reason="the real weights and texts do not lie beside this checkout")
    for item in items:
        if "real" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with real weights, texts and tokenizers."""
    return REAL_DATA
