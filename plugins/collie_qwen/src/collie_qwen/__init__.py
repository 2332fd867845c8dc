"""The Qwen model families with experts for CoLLiE. Importing this file costs neither torch nor transformers."""

from collie_core.api import Component

QWEN2_MOE = Component(
    build="collie_qwen.family:QWEN2_MOE",
    summary="Qwen 1.5 and 2 with experts, one of which every token takes",
)
QWEN3_MOE = Component(
    build="collie_qwen.family:QWEN3_MOE",
    summary="Qwen 3 with experts",
)

__all__ = ["QWEN2_MOE", "QWEN3_MOE"]
