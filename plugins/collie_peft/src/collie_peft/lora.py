"""LoRA through peft, also on layers that tensor-parallel ranks share.

W x + (lora_alpha / r) B A x (arXiv 2106.09685). Where ranks share the outputs of W they share those of B, and A is
whole; where they share the inputs of W they share those of A, and B is whole. So neither needs to be gathered, and
merging is local.
"""

from __future__ import annotations

from typing import ClassVar

import peft

from collie_peft.injected import InjectedAdapter


class LoraAdapter(InjectedAdapter):
    """Puts LoRA onto a transformers model."""

    config_class: ClassVar = peft.LoraConfig

    def cut(self, name: str, shape: tuple[int, ...]) -> tuple[int, str] | None:
        """A [r, inputs] lies along the inputs of its layer, B [outputs, r] along the outputs."""
        if ".lora_A." in name:
            return 1, "inputs"
        return (0, "outputs") if ".lora_B." in name else None
