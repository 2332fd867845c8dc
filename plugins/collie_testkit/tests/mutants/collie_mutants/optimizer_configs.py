"""Sections of optimizers."""

from collections.abc import Callable
from typing import Literal

from pydantic import ConfigDict, Field

from collie_core.api import OptimizerConfig


class Undocumented(OptimizerConfig):
    type: Literal["undocumented"] = "undocumented"
    momentum: float = 0.9


class Careless(OptimizerConfig):
    model_config = ConfigDict(extra="ignore")

    type: Literal["careless"] = "careless"


class Wordless(OptimizerConfig):
    type: Literal["wordless"] = "wordless"
    rate_of: Callable[[int], float] | None = Field(None, description="No JSON Schema has functions.")


class AnyRate(OptimizerConfig):
    type: Literal["any-rate"] = "any-rate"
    lr: float = Field(1e-2, description="Without bounds.")
