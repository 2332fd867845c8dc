"""A clean environment in a moment: `python .ci/clean.py FOLDER WHEELS REQUIREMENT...`.

It holds the requirements, all that these declare, and nothing else. Distributions of the folder WHEELS are installed
from there by pip. The others are links into the environment that runs this, which pip has filled from constraints.txt;
so nothing is downloaded, unpacked and compiled a second time. Nothing is resolved either: what is declared and not
here, or here in a version that is not allowed, is an error. Let pip uninstall nothing from it: that follows the links.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement


def declared(wanted: Iterable[str], places: list[str]) -> dict[str, metadata.Distribution]:
    """By name: the distributions that are wanted and, with extras and markers, all that they require."""
    found: dict[str, metadata.Distribution] = {}
    done: set[tuple[str, str]] = set()  # (name, extra)
    todo = [Requirement(text) for text in wanted]
    while todo:
        requirement = todo.pop()
        dist = next(iter(metadata.distributions(name=requirement.name, path=places)), None)
        have = dist.version if dist else "nothing"
        if dist is None or not requirement.specifier.contains(have, prereleases=True):
            raise SystemExit(f"{requirement} is declared and {have} is here")
        found[dist.name] = dist
        for extra in {"", *requirement.extras} - {extra for name, extra in done if name == dist.name}:
            done.add((dist.name, extra))
            texts = map(Requirement, dist.requires or ())
            todo += [one for one in texts if one.marker is None or one.marker.evaluate({"extra": extra})]
    return found


def link(dist: metadata.Distribution, site: Path) -> None:
    """Link what an installed distribution has on top of site-packages; programs in bin/ are left out."""
    for line in (dist.read_text("RECORD") or "").splitlines():
        top = line.partition(",")[0].partition("/")[0]
        # A namespace package comes whole with the first distribution that has a part of it.
        if top not in ("..", "__pycache__") and not (site / top).exists():
            (site / top).symlink_to(dist.locate_file(top))


def main(folder: Path, wheels: Path, wanted: list[str]) -> None:
    files = {str(path): path for path in wheels.glob("*.whl")}
    venv.create(folder, with_pip=False, symlinks=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    ours = []
    for dist in declared(wanted, [*files, *sys.path]).values():
        archive = next((file for file in files if str(dist.locate_file("")).startswith(file)), None)
        if archive is None:
            link(dist, site)
        else:
            ours.append(archive)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", *ours], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
