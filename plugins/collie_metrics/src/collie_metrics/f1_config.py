"""An item `{type: f1}` of the `metrics` of an evaluator."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from collie_core.api import ComponentConfig


class F1Config(ComponentConfig):
    """Precision, recall and F1 of choices."""

    type: Literal["f1"] = "f1"
    average: list[Literal["micro", "macro", "weighted"]] = Field(
        ["micro", "macro", "weighted"],
        min_length=1,
        description="micro: of all counts together; macro: the mean over the classes; weighted: the mean over the "
        "classes, each by its number of targets.",
    )
    labels: list[str | int] | None = Field(
        None,
        min_length=1,
        description="The classes that count. Another target is an error, another prediction a miss. Default: those "
        "that occur.",
    )
    positive: str | int | None = Field(
        None, description="Also the numbers of this class alone, as in a task of two classes."
    )

    @field_validator("average", "labels")
    @classmethod
    def _once(cls, value: list[str | int] | None) -> list[str | int] | None:
        if value and (twice := sorted({str(item) for item in value if value.count(item) > 1})):
            raise ValueError(f"must name each only once, not {', '.join(twice)}")
        return value

    @model_validator(mode="after")
    def _known(self) -> F1Config:
        if self.labels is not None and self.positive is not None and self.positive not in self.labels:
            raise ValueError(f"positive: {self.positive!r} must be one of labels")
        return self
