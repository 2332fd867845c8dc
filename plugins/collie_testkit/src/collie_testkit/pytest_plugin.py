"""The fixtures of the kit, for every test run of an environment that has it. Light: it is always imported."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from collie_testkit.zygote import Zygote


def pytest_configure(config: pytest.Config) -> None:
    """Make the mark known that every case of `checks` has."""
    config.addinivalue_line("markers", "collie_check(level): a check of a plugin by collie-testkit")


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """Runs functions of a test file on several ranks."""
    with Zygote() as handle:
        yield handle
