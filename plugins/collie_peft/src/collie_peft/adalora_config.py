"""The `adapter:` section of a config with `type: adalora`: peft's own names and defaults."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from collie_core.api import AdapterConfig

if TYPE_CHECKING:
    from collie_core.api import RunConfig

FLOAT16 = "it adds to gradients, which float16 scales by a changing factor; set model.dtype to bfloat16 or float32"


class AdaLoraConfig(AdapterConfig):
    """AdaLoRA (Zhang et al. 2023): W x + (lora_alpha / init_r) B E A x, with a budget of ranks over all layers."""

    type: Literal["adalora"] = "adalora"
    target_r: PositiveInt = Field(8, description="Singular values that a layer has at the end, on average.")
    init_r: PositiveInt = Field(12, description="Singular values of each layer at the start.")
    tinit: NonNegativeInt = Field(
        0, description="Steps before the first singular value is taken. Importance is noise in the first steps."
    )
    tfinal: NonNegativeInt = Field(0, description="Steps at the end, in which the allocation stays as it is.")
    deltaT: PositiveInt = Field(1, description="Steps from one allocation to the next.")
    beta1: float = Field(0.85, gt=0, lt=1, description="Memory of the average sensitivity, per step.")
    beta2: float = Field(0.85, gt=0, lt=1, description="Memory of the average uncertainty, per step.")
    orth_reg_weight: float = Field(
        0.5,
        ge=0,
        description="Weight of the penalty on A and B that are not orthogonal. The logged loss is without it.",
    )
    total_step: PositiveInt | None = Field(
        None, description="Steps over which the budget shrinks, tinit and tfinal included; default: those of the run."
    )
    lora_alpha: PositiveInt = Field(8, description="The update is scaled by lora_alpha / init_r.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the input of A.")
    target_modules: list[str] | str | None = Field(
        None,
        description="Layers that get an adapter: a list of name endings, a regular expression over whole "
        "names, or all-linear; default: peft's choice for the model family.",
    )
    exclude_modules: list[str] | str | None = Field(
        None, description="Layers that get none although target_modules names them; written the same way."
    )
    init_lora_weights: bool = Field(True, description="true: the update starts at 0. false: random, for tests.")
    modules_to_save: list[str] | None = Field(
        None, description="Modules that are trained and saved whole, e.g. lm_head after new tokens."
    )
    layers_to_transform: list[int] | int | None = Field(None, description="Only these layers; default: all.")
    layers_pattern: list[str] | str | None = Field(
        None, description="The name of the list of layers, where peft does not know it."
    )

    def refused(self, config: RunConfig) -> str:
        """See `AdapterConfig`: where there is no gradient to look at, and budgets that cannot be reached."""
        if config.parallel.zero_stage > 0:
            return (
                "it looks at whole gradients before an update, and DeepSpeed shares them; set parallel.zero_stage to 0"
            )
        optimizer = config.optimizer.type
        if getattr(config.registry.component("optimizer", optimizer).can, "fuses_backward", False):
            return f"it looks at gradients before an update, and {optimizer} drops them in backward; use adamw"
        if config.model.dtype == "float16":
            return FLOAT16
        if self.adapter_name_or_path is not None:  # its options are in its folder
            return ""
        if self.target_r > self.init_r:
            return f"target_r={self.target_r} is above init_r={self.init_r}, and ranks can only shrink; set it lower"
        return unreachable(self.tinit, self.tfinal, self.total_step, config.train.max_steps)


def unreachable(tinit: int, tfinal: int, total_step: int | None, steps: int | None) -> str:
    """Why a run of so many steps, None where it is not known yet, never comes to the final budget; "" when it does."""
    total = total_step or steps
    if total is None:
        return ""
    if tinit + tfinal >= total:
        return (
            f"tinit={tinit} and tfinal={tfinal} leave none of {total} steps to shrink ranks in; set one of them lower"
        )
    if steps is not None and total - tfinal > steps:
        return f"with total_step={total} the run of {steps} steps ends before ranks are at target_r; leave it out"
    return ""
