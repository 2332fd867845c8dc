"""Level 0, every kind: the package, what it says of itself, and what describing it costs."""

from __future__ import annotations

import json
import subprocess
import sys

from packaging.specifiers import SpecifierSet
from pydantic import BaseModel, PydanticUserError, ValidationError

from collie_testkit.context import Context
from collie_testkit.registry import Skipped, check, expect

HEAVY = ("torch", "transformers", "deepspeed", "peft", "numpy", "fastapi")
"""What a description must not import: `collie schema` and `collie plugins` describe every installed plugin."""

_DESCRIBE = """
import sys
from collie_core.api import Plugins
plugins, (kind, name) = Plugins.discover(), sys.argv[1:]
plugins.component(kind, name)
plugins.config_model(kind, name)
print(*sorted(set(sys.modules) & {heavy}))
"""


@check(level=0, mutant="boundless")
def metadata(context: Context) -> None:
    """The package has a summary, and requires a range of versions of collie-core with a lower and an upper end."""
    entry = context.entry
    expect(entry.summary, f"{entry.distribution} has no description in its pyproject.toml")
    if entry.distribution == "collie-core":
        return
    found = entry.requires_core
    ends = {specifier.operator for specifier in SpecifierSet(found)}
    expect(
        ends & {"==", "~="} or (ends & {">", ">="} and ends & {"<", "<="}),
        f"{entry.distribution} requires collie-core {found or 'of any version'}: write collie-core>=0.1,<1",
    )


@check(level=0, mutant="heavy")
def light(context: Context) -> None:
    """Its description and its configuration model import no torch, nor anything that takes as long."""
    code = _DESCRIBE.format(heavy=set(HEAVY))
    environment = {"PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code, context.kind, context.entry.qualified],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    expect(done.returncode == 0, f"it cannot be described: {done.stderr.strip().rpartition(chr(10))[2]}")
    expect(not done.stdout.split(), f"{context.component.config or context.entry.value} imports {done.stdout.strip()}")


@check(level=0, mutant="incomplete")
def contract(context: Context) -> None:
    """`build` can be imported, takes the fields of the section, and has the methods of its kind."""
    context.plugins.check(context.entry)


@check(level=0, mutant="undocumented")
def documented(context: Context) -> None:
    """Every field of the section has a description."""
    fields = _section(context).model_fields
    silent = [name for name, field in fields.items() if name != "type" and not field.description]
    expect(not silent, f"{', '.join(silent)}: write Field(..., description=...)")


@check(level=0, mutant="careless")
def strict(context: Context) -> None:
    """The section refuses a field that it does not know."""
    try:
        _section(context).model_validate({**context.written, "no_such_field": 1})
    except ValidationError:
        return
    expect(False, "no_such_field: 1 was taken without a word; derive the model from collie_core.api.ComponentConfig")


@check(level=0, mutant="wordless")
def schema(context: Context) -> None:
    """The section has a JSON Schema, and comes back the same from JSON."""
    model = _section(context)
    try:
        model.model_json_schema()
    except PydanticUserError as error:
        expect(False, f"it has no JSON Schema: {' '.join(str(error).split())}")
    config = context.config
    again = model.model_validate(json.loads(config.model_dump_json()))
    expect(again == config, f"{config!r} comes back as {again!r}")


def _section(context: Context) -> type[BaseModel]:
    if context.kind in ("model", "hooks", "commands"):
        raise Skipped(f"plugins of kind {context.kind} have no section of their own")
    return context.plugins.config_model(context.kind, context.name)
