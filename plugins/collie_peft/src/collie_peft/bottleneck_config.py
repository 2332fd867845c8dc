"""The `adapter:` section of a config with `type: bottleneck`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, PositiveInt

from collie_core.api import AdapterConfig

if TYPE_CHECKING:
    from collie_core.api import RunConfig

PLACES = {"houlsby": ["o_proj", "down_proj"], "pfeiffer": ["down_proj"]}


class BottleneckConfig(AdapterConfig):
    """Bottleneck adapters (Houlsby et al. 2019, Pfeiffer et al. 2020): small networks after the outputs of layers."""

    type: Literal["bottleneck"] = "bottleneck"
    placement: Literal["houlsby", "pfeiffer"] = Field(
        "houlsby", description="After attention and feed-forward (o_proj, down_proj), or after feed-forward alone."
    )
    reduction_factor: PositiveInt = Field(16, description="Width of the layer over the width of the bottleneck.")
    non_linearity: Literal["relu", "gelu", "silu"] = Field("relu", description="Between the two matrices.")
    target_modules: list[str] | None = Field(
        None,
        min_length=1,
        description="Endings of the names of the layers, where they are others than placement says.",
    )

    @property
    def targets(self) -> list[str]:
        """Endings of the names of the layers."""
        return self.target_modules or PLACES[self.placement]

    def refused(self, config: RunConfig) -> str:
        """See `AdapterConfig`."""
        if self.target_modules is None or config.parallel.tensor_parallel_size == 1:
            return ""
        return (
            "layers other than those of placement may have outputs that ranks share, which a bottleneck cannot look at "
            "in part; set tensor_parallel_size to 1, or leave target_modules out"
        )
