"""An item `{type: exact-match}` of the `metrics` of an evaluator."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from collie_core.api import ComponentConfig


class ExactMatchConfig(ComponentConfig):
    """What makes no difference between an answer and a reference. All of `ignore_` is the comparison of SQuAD."""

    type: Literal["exact-match"] = "exact-match"
    strip: bool = Field(True, description="Ignore spaces and line ends around the text.")
    ignore_case: bool = Field(False, description="Ignore case.")
    ignore_punctuation: bool = Field(False, description="Ignore punctuation of any script and symbols of ASCII.")
    ignore_articles: bool = Field(False, description="Ignore a, an and the.")
    ignore_spacing: bool = Field(False, description="Ignore how many spaces or line ends stand between words.")
    unicode_form: Literal["NFC", "NFKC"] | None = Field(
        None, description="NFC: ignore how accents are encoded; NFKC: ignore width and other forms of a character too."
    )
