"""A key of the configuration that nothing reads would be a promise that nothing keeps."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

import collie_core
from collie_core.config.component import section_of
from collie_core.config.run import RunConfig

SOURCE = Path(collie_core.__file__).parent
# Where derived values are made; the other files of config/ only describe fields, or refuse them.
DERIVED = {SOURCE / "config" / "run.py", SOURCE / "config" / "batch.py"}


def _fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, field in model.model_fields.items():
        section = section_of(field.annotation, field.metadata)
        yield f"{prefix}{name}", name
        if isinstance(section, type):
            yield from _fields(section, f"{prefix}{name}.")


def _attributes_read() -> set[str]:
    read = set()
    for path in SOURCE.rglob("*.py"):
        if path.parent != SOURCE / "config" or path in DERIVED:
            nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            read |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return read


@pytest.fixture(scope="module")
def read() -> set[str]:
    return _attributes_read()


@pytest.mark.parametrize(("key", "name"), list(_fields(RunConfig)), ids=lambda value: str(value))
def test_it_is_read(key: str, name: str, read: set[str]) -> None:
    assert name in read, f"nothing reads {key}"
