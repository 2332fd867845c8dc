"""A plugin of pytest: of the parameters of a test only the first are taken, `-p first_of_each`.

For tests that have all run in the checkout and run again in a clean environment. What is missing there, a file of a
wheel or a dependency, shows with any parameters.
"""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the others."""
    first: dict[str, pytest.Item] = {}
    for item in items:
        first.setdefault(item.nodeid.partition("[")[0], item)
    kept = set(first.values())
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]
