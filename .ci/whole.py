"""Whether a wheel is whole and declares what it imports: `python .ci/whole.py ENVIRONMENT PACK`.

ENVIRONMENT holds the pack and what it declares. Each file of the pack's sources must be there, and each module that
one of them imports, anywhere: also in a function that no test calls. Extras need not be there.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import tomllib
from packaging.requirements import Requirement


def imported(source: str) -> Iterator[str]:
    """Names on top of the modules that are imported."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module.partition(".")[0]


def complaints(environment: Path, pack: Path) -> Iterator[str]:
    """What is missing."""
    site = Path(sysconfig.get_path("purelib", vars={"base": str(environment), "platbase": str(environment)}))
    extras = tomllib.loads((pack / "pyproject.toml").read_text())["project"].get("optional-dependencies", {})
    known = {Requirement(text).name.replace("-", "_") for texts in extras.values() for text in texts}
    known |= {path.name.partition(".")[0] for path in site.iterdir()} | sys.stdlib_module_names
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", "src"]
    files = subprocess.run(listed, cwd=pack, check=True, capture_output=True, text=True).stdout
    for name in filter(None, files.split("\0")):
        source = pack / name
        if not source.exists():
            continue  # removed and not committed
        if not (site / name.removeprefix("src/")).is_file():
            yield f"{source} is not in the wheel"
        if source.suffix == ".py":
            for module in sorted(set(imported(source.read_text())) - known):
                yield f"{source} imports {module}, which is not declared"


if __name__ == "__main__":
    sys.exit("\n".join(complaints(Path(sys.argv[1]), Path(sys.argv[2]))) or None)
