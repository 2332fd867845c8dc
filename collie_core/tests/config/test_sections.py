"""What every section promises: closed, frozen, exact about numbers, each field described."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field, ValidationError

from collie_core.config.aliases import ALIASES
from collie_core.config.base import ConfigModel, PlainMapping
from collie_core.config.component import OfKind, section_of
from collie_core.config.problems import Guide
from collie_core.config.run import RunConfig
from collie_core.optimizers.configs import AdamWConfig, SGDConfig
from collie_core.plugins import Plugins


class Sample(ConfigModel):
    count: int = 1
    counts: list[int] = Field([])
    level: Literal[0, 1] = 0
    ratio: float | None = None
    switch: bool = False
    either: bool | int = False
    text: str = ""
    free: PlainMapping = Field({})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("count", True),
        ("counts", [1, False]),
        ("level", True),
        ("ratio", True),
        ("ratio", float("nan")),
        ("ratio", "inf"),
        ("count", 2**63),
        ("count", 1.5),
        ("counts", [-(2**70)]),
        ("text", True),
        ("text", 5),
        ("free", {"a": [float("inf")]}),
        ("free", {"a": {"b": 2**64}}),
        ("free", {"a": object()}),
        ("free", {1: "a"}),
        ("other", 1),
    ],
)
def test_what_is_not_exact_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ValidationError):
        Sample(**{field: value})


@pytest.mark.parametrize(
    ("field", "value", "kept"),
    [
        ("count", 10.0, 10),
        ("count", "12", 12),
        ("counts", [1, 2], [1, 2]),
        ("level", 1, 1),
        ("ratio", 1, 1.0),
        ("ratio", "1e-5", 1e-5),
        ("switch", "yes", True),
        ("switch", "off", False),
        ("either", True, True),
        ("free", {"a": {"b": [None, True, 1, 1.5, "x"]}}, {"a": {"b": [None, True, 1, 1.5, "x"]}}),
    ],
)
def test_what_is_meant_alike_is_taken(field: str, value: Any, kept: Any) -> None:
    assert getattr(Sample(**{field: value}), field) == kept


def test_sections_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Sample().count = 2  # type: ignore[misc]


def _sections(model: type[BaseModel]) -> list[type[BaseModel]]:
    found = [model]
    for field in model.model_fields.values():
        section = section_of(field.annotation, field.metadata)
        if isinstance(section, type):
            found += _sections(section)
    return found


def test_every_field_is_described_once() -> None:
    for section in [*_sections(RunConfig), AdamWConfig, SGDConfig]:
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"
            assert field.description.endswith((".", "...")), f"{section.__name__}.{name}: {field.description}"


def test_the_component_sections_are_found() -> None:
    fields = RunConfig.model_fields
    assert section_of(fields["optimizer"].annotation, fields["optimizer"].metadata) == OfKind(
        "optimizer", default="adamw"
    )
    assert section_of(fields["adapter"].annotation, fields["adapter"].metadata) == OfKind("adapter")


def test_aliases_lead_to_fields_and_hide_none() -> None:
    guide = Guide(RunConfig, Plugins.discover())
    data = {"optimizer": {"type": "adamw"}}
    for name, alias in ALIASES.items():
        section, _, key = alias.target.rpartition(".")
        if section != "adapter":  # its fields are those of a plugin
            assert key in guide.fields([section] if section else [], data), alias.target
        assert name not in RunConfig.model_fields
