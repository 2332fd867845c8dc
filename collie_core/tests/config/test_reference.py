"""docs/configuration.md says what the code says."""

from __future__ import annotations

from pathlib import Path

import pytest

from collie_core.config.reference import PACKS, configuration_page
from collie_core.config.run import RunConfig
from collie_core.plugins import Plugins

ROOT = Path(__file__).parents[3]


def test_the_page_of_the_docs_is_what_the_models_say() -> None:
    missing = PACKS - {entry.distribution for entry in Plugins.discover().entries}
    if missing:
        pytest.skip(f"the page documents packs that are not installed here: {', '.join(sorted(missing))}")
    page = ROOT / "docs" / "configuration.md"
    assert page.read_text(encoding="utf-8") == configuration_page(), "make docs writes it anew"


def test_every_section_is_there_with_whatever_is_installed() -> None:
    page = configuration_page()
    for name in RunConfig.model_fields:
        assert f"\n## {name}\n" in page or f"\n| `{name}` |" in page
    assert "| `path` | text | required |" in page
    assert "### optimizer `type: adamw`" in page
