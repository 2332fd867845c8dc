"""A new package with one plugin that works, to change: `collie plugins new`. The templates lie beside this file."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from string import Template

from collie_core.errors import PluginError
from collie_core.plugins import CORE, normalise

KINDS = ("model", "optimizer", "adapter", "metric", "server")
CORE_RANGE = f"{CORE}>=0.1,<1"
_LIBRARIES = {"optimizer": ("torch",), "adapter": ("peft", "safetensors"), "model": ("transformers",)}


def write_package(kind: str, name: str, folder: Path) -> list[Path]:
    """Write the package of a new plugin into a folder that does not exist or is empty; returns its files.

    Raises:
        PluginError: the name cannot be one, or the folder holds something.
    """
    if not re.fullmatch(r"[A-Za-z](?:[A-Za-z0-9._-]*[A-Za-z0-9])?", name):
        raise PluginError(f"{name!r} cannot name a plugin: use letters, digits and - between them, a letter first")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PluginError(f"{folder} exists already and is not empty; choose another folder with --output")
    words = _words(kind, name)
    written = []
    for path, template in _templates(kind, words["module"]):
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        text = files(__name__).joinpath(*template.split("/")).read_text(encoding="utf-8")
        target.write_text(Template(text).substitute(words), encoding="utf-8")
        written.append(target)
    return written


def _words(kind: str, name: str) -> dict[str, str]:
    """What stands for the names in the templates."""
    short = normalise(name)
    attribute = short.replace("-", "_")
    libraries = (CORE_RANGE, *_LIBRARIES.get(kind, ()))
    return {
        "kind": kind,
        "raw": name,
        "name": short,
        "attribute": attribute,
        "distribution": f"collie-{short}",
        "module": f"collie_{attribute}",
        "class": "".join(part.capitalize() for part in short.split("-")),
        "requirements": ", ".join(f'"{library}"' for library in libraries),
        "stock": _stock_type(name) if kind == "model" else "",
    }


def _stock_type(name: str) -> str:
    """The llama's classes for a family that transformers does not contain."""
    from transformers import CONFIG_MAPPING

    return "" if name in CONFIG_MAPPING else ', stock_type="llama"'


def _templates(kind: str, module: str) -> list[tuple[str, str]]:
    """Path in the package, and template."""
    found = [
        ("pyproject.toml", "common/pyproject.toml.template"),
        (f"{module}/__init__.py", f"{kind}/__init__.py.template"),
        (f"tests/test_{module.removeprefix('collie_')}.py", "common/test.py.template"),
    ]
    if kind != "model":  # the description of a family is all of it
        found.insert(2, (f"{module}/{kind}.py", f"{kind}/{kind}.py.template"))
    return found
