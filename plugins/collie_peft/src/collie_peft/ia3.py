"""(IA)^3 through peft, also on layers that tensor-parallel ranks share.

A layer's outputs, or of a feed-forward layer the inputs, are multiplied by a learned vector (arXiv 2205.05638). It is
cut as they are.
"""

from __future__ import annotations

from typing import ClassVar

import peft

from collie_peft.injected import InjectedAdapter


class Ia3Adapter(InjectedAdapter):
    """Puts (IA)^3 onto a transformers model."""

    config_class: ClassVar = peft.IA3Config

    def cut(self, name: str, shape: tuple[int, ...]) -> tuple[int, str] | None:
        """The vector is [outputs, 1], or before a feed-forward layer [1, inputs]."""
        if ".ia3_l." not in name:
            return None
        return (1, "inputs") if shape[0] == 1 else (0, "outputs")
