"""`evaluation:`"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from collie_core.config.base import ComponentConfig, ConfigModel
from collie_core.config.component import OfKind


class PerplexityConfig(ComponentConfig):
    """exp of the mean loss per target token."""

    type: Literal["perplexity"] = Field("perplexity", description="exp of the mean loss per target token.")


class EvaluationConfig(ConfigModel):
    """When and how the model is measured on `data.eval`."""

    steps: PositiveInt | None = Field(None, description="Steps between evaluations; always one at the end.")
    on_start: bool = Field(False, description="Also evaluate before the first step.")
    per_device_eval_batch_size: PositiveInt | None = Field(
        None, description="Samples per forward on one device; default: as in training."
    )
    evaluators: list[Annotated[ComponentConfig, OfKind("metric")]] = Field(
        [PerplexityConfig()], description="What is measured: metrics of the token losses."
    )
    print_samples: NonNegativeInt = Field(0, le=100, description="Held-out prompts to answer at each evaluation.")
