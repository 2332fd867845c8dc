"""An item `{type: rouge}` of the `metrics` of an evaluator."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from collie_core.api import ComponentConfig


class RougeConfig(ComponentConfig):
    """ROUGE (Lin 2004): the mean over the samples; of several references the best counts."""

    type: Literal["rouge"] = "rouge"
    rouge_types: list[Literal["rouge1", "rouge2", "rouge3", "rouge4", "rougeL", "rougeLsum"]] = Field(
        ["rouge1", "rouge2", "rougeL", "rougeLsum"],
        min_length=1,
        description="N-grams, the longest common subsequence of the whole text, or that line by line.",
    )
    scores: list[Literal["f1", "precision", "recall"]] = Field(
        ["f1"], min_length=1, description="F1 goes by the name of the type alone, as rouge1; others as rouge1_recall."
    )
    use_stemmer: bool = Field(False, description="Cut endings of English words; with the tokenizer rouge only.")
    tokenizer: Literal["rouge", "words", "characters"] = Field(
        "rouge",
        description="rouge: runs of a-z and 0-9, as published numbers have it; words: runs of letters, numbers and "
        "marks of any script; characters: each of them, for scripts without spaces.",
    )

    @model_validator(mode="after")
    def _english(self) -> RougeConfig:
        if self.use_stemmer and self.tokenizer != "rouge":
            raise ValueError(f"use_stemmer needs tokenizer: rouge, not {self.tokenizer}")
        return self
