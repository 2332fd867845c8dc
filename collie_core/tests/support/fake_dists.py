"""Plugin distributions made on the spot: a folder on `sys.path` is an installation, pip is not needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


def write_distribution(
    site: Path,
    name: str,
    *,
    version: str = "1.0",
    groups: Mapping[str, Mapping[str, str]],
    files: Mapping[str, str] | None = None,
    summary: str = "made for a test",
    requires: Sequence[str] = ("collie-core>=0.1,<1",),
) -> Path:
    """Install `name` into the folder `site`; returns its dist-info folder.

    `groups` maps entry-point groups to {name: value}; `files` maps paths below `site` to their text.
    """
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    headers = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", f"Summary: {summary}"]
    headers += [f"Requires-Dist: {requirement}" for requirement in requires]
    (info / "METADATA").write_text("\n".join([*headers, "", "# README\n"]), encoding="utf-8")
    lines = [
        line
        for group, entries in groups.items()
        for line in (f"[{group}]", *(f"{key} = {value}" for key, value in entries.items()), "")
    ]
    (info / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
    for path, text in (files or {}).items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(text, encoding="utf-8")
    return info


def write_many(site: Path, count: int, broken: int, heavy: int) -> None:
    """Install `count` distributions: the first `broken` do not import, the next `heavy` build with torch."""
    kinds = ("optimizer", "metric", "adapter")
    for number in range(count):
        kind, module = kinds[number % len(kinds)], f"many_pack_{number}"
        description = f'from collie_core.api import Component\nPART = Component(build="{module}.build:Part")\n'
        build = "import torch\n" if broken <= number < broken + heavy else ""
        files = {
            f"{module}/__init__.py": "import no_such_module\n" if number < broken else description,
            f"{module}/build.py": f"{build}class Part: ...\n",
        }
        groups = {f"collie.{kind}": {f"part-{number}": f"{module}:PART"}}
        write_distribution(site, f"collie-many-{number}", groups=groups, files=files)
