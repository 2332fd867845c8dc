"""Adapters for CoLLiE through peft. This file only describes them: it costs neither torch nor pydantic."""

from collie_core.api import Component

LORA = Component(
    build="collie_peft.lora:LoraAdapter",
    config="collie_peft.lora_config:LoraConfig",
    summary="low-rank adaptation through peft (arXiv 2106.09685), with rsLoRA and DoRA",
)

__all__ = ["LORA"]
