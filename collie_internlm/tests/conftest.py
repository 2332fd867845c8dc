"""The modules in `support/` can be imported; tests of a family that this transformers lacks are left out."""

import sys
from pathlib import Path

import pytest
import transformers

sys.path.append(str(Path(__file__).parent / "support"))  # --import-mode=importlib adds no folder by itself


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if hasattr(transformers, "InternLM3Config"):
        return
    skip = pytest.mark.skip(reason=f"transformers {transformers.__version__} has no InternLM 3")
    for item in items:
        callspec = getattr(item, "callspec", None)
        case = callspec.params.get("case") if callspec else None
        if "of_internlm3" in item.name or "test_internlm3" in item.name or case == "internlm3":
            item.add_marker(skip)
