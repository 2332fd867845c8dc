"""The `adapter:` section of a config with `type: lora`: peft's own names and defaults."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, PositiveInt

from collie_core.api import AdapterConfig

if TYPE_CHECKING:
    from collie_core.api import RunConfig

Initialisation = Literal["gaussian", "orthogonal", "pissa", "olora"]
"""The initialisations that need no data and no second model."""


class LoraConfig(AdapterConfig):
    """Low-rank adaptation (Hu et al. 2021): W x + (lora_alpha / r) B A x, where only A and B are trained."""

    type: Literal["lora"] = "lora"
    r: PositiveInt = Field(8, description="The rank: rows of A, columns of B.")
    lora_alpha: PositiveInt = Field(8, description="The update is scaled by lora_alpha / r.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the input of A.")
    target_modules: list[str] | str | None = Field(
        None,
        description="Layers that get an adapter: a list of name endings, a regular expression over whole "
        "names, or all-linear; default: peft's choice for the model family.",
    )
    exclude_modules: list[str] | str | None = Field(
        None, description="Layers that get none although target_modules names them; written the same way."
    )
    bias: Literal["none", "all", "lora_only"] = Field("none", description="Biases that are trained as well.")
    use_rslora: bool = Field(False, description="Scale by lora_alpha / sqrt(r) (arXiv 2312.03732).")
    use_dora: bool = Field(False, description="Train magnitude and direction apart (arXiv 2402.09353).")
    init_lora_weights: bool | Initialisation = Field(
        True,
        description="true: the update starts at 0. false: random, for tests. "
        "gaussian, orthogonal, pissa or olora: see peft.",
    )
    modules_to_save: list[str] | None = Field(
        None, description="Modules that are trained and saved whole, e.g. lm_head after new tokens."
    )
    layers_to_transform: list[int] | int | None = Field(None, description="Only these layers; default: all.")
    layers_pattern: list[str] | str | None = Field(
        None, description="The name of the list of layers, where peft does not know it."
    )
    rank_pattern: dict[str, PositiveInt] = Field({}, description="Other ranks: name or regular expression to r.")
    alpha_pattern: dict[str, PositiveInt] = Field(
        {}, description="Other scales: name or regular expression to lora_alpha."
    )

    def refused(self, config: RunConfig) -> str:
        """See `AdapterConfig`: what is computed from whole layers' weights."""
        parallel, start = config.parallel, self.init_lora_weights
        if self.use_dora and parallel.tensor_parallel_size > 1:
            return (
                "use_dora needs the norms of whole layers' weights, which tensor-parallel ranks share; "
                "set tensor_parallel_size to 1 (pipeline_parallel_size and zero_stage share the model too)"
            )
        if start in ("pissa", "olora") and parallel.copy_size > 1:
            return (
                f"init_lora_weights={start} is computed from the weights of whole layers, which the ranks of one copy "
                "of the model share; set tensor_parallel_size and pipeline_parallel_size to 1, or leave it out"
            )
        return ""
