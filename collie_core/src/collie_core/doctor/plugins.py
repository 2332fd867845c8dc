"""Plugins that do not work."""

from __future__ import annotations

from collections.abc import Iterator

from collie_core.doctor.finding import Finding, error, ok, warning
from collie_core.errors import PluginError
from collie_core.plugins import Plugins


def check() -> Iterator[Finding]:
    """What `collie plugins --check` finds. Broken hooks stop every run, another plugin only one that names it."""
    plugins, broken = Plugins.discover(), 0
    for entry in plugins.entries:
        try:
            plugins.check(entry)
        except PluginError as failure:
            broken += 1
            found = error if entry.kind == "hooks" else warning
            way_out = f"install another version of {entry.distribution}, or block it: COLLIE_BLOCK={entry.distribution}"
            yield found(str(failure), way_out)
    blocked = f", {len(plugins.blocked)} blocked" if plugins.blocked else ""
    yield ok(f"{len(plugins.entries) - broken} of {len(plugins.entries)} plugins work{blocked}")
