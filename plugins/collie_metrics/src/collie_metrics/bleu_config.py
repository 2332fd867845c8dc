"""An item `{type: bleu}` of the `metrics` of an evaluator: sacrebleu's own names and defaults."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from collie_core.api import ComponentConfig


class BleuConfig(ComponentConfig):
    """Corpus BLEU (Papineni et al. 2002; Post 2018)."""

    type: Literal["bleu"] = "bleu"
    lowercase: bool = Field(False, description="Compare without case.")
    tokenize: Literal["13a", "intl", "zh", "char", "none"] = Field(
        "13a",
        description="13a: the usual words; intl: by Unicode classes; zh: Chinese; char: characters; none: spaces.",
    )
    smooth_method: Literal["exp", "floor", "add-k", "none"] = Field(
        "exp", description="What stands for the precision of an order without a match."
    )
    smooth_value: float | None = Field(None, ge=0, description="Of floor (0.1 by default) or add-k (1).")
    max_ngram_order: PositiveInt = Field(4, description="The longest n-grams.")
    effective_order: bool = Field(False, description="Leave out orders that are longer than every answer.")

    @model_validator(mode="after")
    def _smoothing(self) -> BleuConfig:
        if self.smooth_value is not None and self.smooth_method not in ("floor", "add-k"):
            raise ValueError(f"smooth_value needs smooth_method: floor or add-k, not {self.smooth_method}")
        return self
