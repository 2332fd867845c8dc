"""Adapters for CoLLiE through peft. This file only describes them: it costs neither torch nor pydantic."""

from collie_core.api import Component

BOTTLENECK = Component(
    build="collie_peft.bottleneck:BottleneckAdapter",
    config="collie_peft.bottleneck_config:BottleneckConfig",
    summary="small networks after the outputs of layers (arXiv 1902.00751, 2005.00247)",
)
IA3 = Component(
    build="collie_peft.ia3:Ia3Adapter",
    config="collie_peft.ia3_config:Ia3Config",
    summary="learned factors on outputs or inputs of layers, through peft (arXiv 2205.05638)",
)
LORA = Component(
    build="collie_peft.lora:LoraAdapter",
    config="collie_peft.lora_config:LoraConfig",
    summary="low-rank adaptation through peft (arXiv 2106.09685), with rsLoRA and DoRA",
)

__all__ = ["BOTTLENECK", "IA3", "LORA"]
