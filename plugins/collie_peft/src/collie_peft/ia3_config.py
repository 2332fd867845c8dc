"""The `adapter:` section of a config with `type: ia3`: peft's own names and defaults."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from collie_core.api import AdapterConfig


class Ia3Config(AdapterConfig):
    """(IA)^3 (Liu et al. 2022): learned factors on the outputs of layers, or on the inputs of feed-forward layers."""

    type: Literal["ia3"] = "ia3"
    target_modules: list[str] | str | None = Field(
        None,
        description="Layers that get a vector: a list of name endings, or a regular expression over whole names; "
        "default: peft's choice for the model family.",
    )
    exclude_modules: list[str] | str | None = Field(
        None, description="Layers that get none although target_modules names them; written the same way."
    )
    feedforward_modules: list[str] | str | None = Field(
        None, description="Those of them whose inputs are multiplied, not their outputs; default: peft's choice."
    )
    modules_to_save: list[str] | None = Field(
        None, description="Modules that are trained and saved whole, e.g. lm_head after new tokens."
    )
    init_ia3_weights: bool = Field(True, description="Start at 1, so that the model is as before. false: for tests.")
