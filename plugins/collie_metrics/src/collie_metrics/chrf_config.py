"""An item `{type: chrf}` of the `metrics` of an evaluator: sacrebleu's own names and defaults."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from collie_core.api import ComponentConfig


class ChrfConfig(ComponentConfig):
    """Corpus chrF (Popović 2015), or chrF++ (Popović 2017)."""

    type: Literal["chrf"] = "chrf"
    char_order: PositiveInt = Field(6, description="The longest n-grams of characters.")
    word_order: NonNegativeInt = Field(0, description="The longest n-grams of words; 2 makes chrF++.")
    beta: PositiveInt = Field(2, description="How many times recall counts as much as precision.")
    lowercase: bool = Field(False, description="Compare without case.")
    whitespace: bool = Field(False, description="Spaces are characters too.")
    eps_smoothing: bool = Field(False, description="Smooth as chrF++.py, NLTK and Moses do.")
