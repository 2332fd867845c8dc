"""The lowest versions that the packs of this repository declare, as pip constraints: `python .ci/lowest.py`.

Requirements without a lower bound, and the packs themselves, are left out. Of two bounds for one distribution the
higher one counts.
"""

from __future__ import annotations

from pathlib import Path

import tomllib
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]


def lowest() -> dict[str, Version]:
    """Version by name, over requirements and extras of every pack."""
    found: dict[str, Version] = {}
    for path in sorted(ROOT.glob("*/pyproject.toml")) + sorted(ROOT.glob("plugins/*/pyproject.toml")):
        project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
        extras = project.get("optional-dependencies", {}).values()
        texts = [*project.get("dependencies", ()), *(text for extra in extras for text in extra)]
        for requirement in map(Requirement, texts):
            for bound in requirement.specifier:
                if bound.operator == ">=" and not requirement.name.startswith("collie"):
                    found[requirement.name] = max(Version(bound.version), found.get(requirement.name, Version("0")))
    return found


if __name__ == "__main__":
    print("\n".join(f"{name}=={version}" for name, version in sorted(lowest().items())))
