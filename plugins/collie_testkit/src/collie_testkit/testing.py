"""`checks`: the checks of a plugin as a test function of pytest, with a case for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from collie_core.api import Plugins
from collie_testkit.context import Context, Material, Shared
from collie_testkit.registry import Check, Failed
from collie_testkit.results import FAILED, KNOWN, SKIPPED, checks_for, require_reasons, run_check


def checks(
    kind: str, name: str, *, known_failures: Mapping[str, str] | None = None, **material: Any
) -> Callable[..., None]:
    """A test of the installed plugin `name`, or `distribution:name`, with one case for each check of its kind.

    Args:
        known_failures: name of a check -> why the plugin fails it. One that passes fails the test.
        material: see `Material`.

    Raises:
        PluginError: `known_failures` names no check, or gives no reason.
        TypeError: `material` has an unknown name.
    """
    known, given = known_failures or {}, Material(**material)
    require_reasons(known, kind)
    plugins = Plugins.discover()
    chosen = checks_for(plugins, kind, name)
    shared: list[Shared] = []
    cases = [pytest.param(check, id=check.name, marks=pytest.mark.collie_check(level=check.level)) for check in chosen]

    @pytest.mark.parametrize("check", cases)
    def test(
        check: Check, request: pytest.FixtureRequest, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        if not shared:
            shared.append(Shared(tmp_path_factory.mktemp(f"{kind}-{name}")))
        context = Context(kind, name, tmp_path, lambda: request.getfixturevalue("zygote"), given, plugins, shared[0])
        result = run_check(check, context, known)
        if result.outcome == FAILED:
            if result.error is not None:
                raise Failed(f"{check.demand}\n{result.reason}") from result.error
            pytest.fail(f"{check.demand}\n{result.reason}", pytrace=False)
        if result.outcome == SKIPPED:
            pytest.skip(result.reason)
        if result.outcome == KNOWN:
            pytest.xfail(result.reason)

    test.__doc__ = f"{kind} {name}"
    return test
