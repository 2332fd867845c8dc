"""The names, arguments and fields that programs and plugins may rely on. A change of them is a change for others.

A change that is meant is written down by `COLLIE_WRITE_API=1 python -m pytest collie_core/tests/test_api.py`, and told
in CHANGELOG.md.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from collie_core import api

SNAPSHOT = Path(__file__).with_name("api.txt")


def described(name: str, thing: Any) -> Iterator[str]:
    """Lines on one public name."""
    if not inspect.isclass(thing):
        yield f"{name}{inspect.signature(thing)}" if callable(thing) else f"{name}: {type(thing).__name__}"
        return
    bases = ", ".join(base.__name__ for base in thing.__bases__ if base is not object)
    yield f"class {name}({bases})" if bases else f"class {name}"
    if issubclass(thing, BaseModel):
        for field, info in thing.model_fields.items():
            default = info.get_default(call_default_factory=True)
            yield f"    {field}: {'required' if info.is_required() else repr(default)}"
    elif dataclasses.is_dataclass(thing):
        for one in dataclasses.fields(thing):
            missing = one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
            yield f"    {one.name}: {one.type}{'' if missing else ' = ...'}"
    elif "__init__" in vars(thing) and not getattr(thing, "_is_protocol", False):
        yield f"    __init__{inspect.signature(thing.__init__)}"
    for member, value in sorted(vars(thing).items()):
        plain = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if member.startswith("_") or (issubclass(thing, BaseModel) and member.startswith("model_")):
            continue
        if isinstance(value, property):
            yield f"    {member}: property"
        elif inspect.isfunction(plain):
            yield f"    {member}{inspect.signature(plain)}"


def test_the_public_interface_is_the_one_written_down() -> None:
    lines = (line for name in sorted(api.__all__) for line in described(name, getattr(api, name)))
    found = re.sub(r" at 0x[0-9a-f]+", "", "\n".join(lines)) + "\n"
    if "COLLIE_WRITE_API" in os.environ:
        SNAPSHOT.write_text(found, encoding="utf-8")
    assert found == SNAPSHOT.read_text(encoding="utf-8")
