"""The `adapter:` sections of methods that put virtual tokens before a sample: peft's own names and defaults."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, PositiveInt, model_validator

from collie_core.api import AdapterConfig

if TYPE_CHECKING:
    from collie_core.api import RunConfig


class PromptConfig(AdapterConfig):
    """What the methods share."""

    num_virtual_tokens: PositiveInt = Field(20, description="Virtual tokens before each sample.")

    def refused(self, config: RunConfig) -> str:
        """See `AdapterConfig`."""
        if config.data.packing:
            return (
                "its virtual tokens stand before each row, and packed rows hold several samples; set data.packing=false"
            )
        if config.parallel.sequence_parallel:
            return (
                "its virtual tokens are no share of the positions; set parallel.sequence_parallel=false, "
                "tensor_parallel_size works without it"
            )
        return ""


class PromptTuningConfig(PromptConfig):
    """Prompt tuning (Lester et al. 2021): learned embeddings before those of the tokens."""

    type: Literal["prompt_tuning"] = "prompt_tuning"
    prompt_tuning_init: Literal["RANDOM", "SAMPLE_VOCAB", "TEXT"] = Field(
        "RANDOM", description="Start at random, at the embeddings of random tokens, or of prompt_tuning_init_text."
    )
    prompt_tuning_init_text: str | None = Field(
        None, min_length=1, description="The text for TEXT, repeated or cut to num_virtual_tokens."
    )
    tokenizer_name_or_path: str | None = Field(
        None, min_length=1, description="Its tokenizer, a folder or hub id; default: the model's."
    )

    @model_validator(mode="after")
    def _text(self) -> PromptTuningConfig:
        if (self.prompt_tuning_init == "TEXT") != (self.prompt_tuning_init_text is not None):
            raise ValueError("prompt_tuning_init=TEXT and prompt_tuning_init_text need each other")
        return self


class PTuningConfig(PromptConfig):
    """P-tuning (Liu et al. 2021): as prompt tuning, with embeddings that a small network makes."""

    type: Literal["p_tuning"] = "p_tuning"
    encoder_reparameterization_type: Literal["MLP", "LSTM"] = Field("MLP", description="The network.")
    encoder_hidden_size: PositiveInt | None = Field(None, description="Its width; default: that of the model.")
    encoder_num_layers: PositiveInt = Field(2, description="Layers of an LSTM; an MLP has 2.")

    @model_validator(mode="after")
    def _layers(self) -> PTuningConfig:
        if self.encoder_reparameterization_type == "MLP" and self.encoder_num_layers != 2:
            raise ValueError("encoder_num_layers is for an LSTM; an MLP has 2")
        return self


class PrefixTuningConfig(PromptConfig):
    """Prefix tuning (Li and Liang 2021): learned keys and values before those of every layer."""

    type: Literal["prefix_tuning"] = "prefix_tuning"
    prefix_projection: bool = Field(False, description="Let a small network make them while training.")
    encoder_hidden_size: PositiveInt | None = Field(None, description="Its width; default: that of one layer's keys.")
    init_weights: Literal["zero"] | None = Field(None, description="zero: keys and values start at 0; default: random.")

    def refused(self, config: RunConfig) -> str:
        """See `AdapterConfig`."""
        if config.model.gradient_checkpointing == "full":
            return (
                "its keys lie in a cache, which computing a layer again would fill twice; set "
                "model.gradient_checkpointing=none"
            )
        return super().refused(config)
