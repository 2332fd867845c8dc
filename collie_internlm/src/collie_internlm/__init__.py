"""The InternLM model families for CoLLiE. Importing this file costs neither torch nor transformers."""

from collie_core.api import Component

INTERNLM = Component(
    build="collie_internlm.family:INTERNLM",
    summary="InternLM 1: llama with biases in attention",
)
INTERNLM2 = Component(
    build="collie_internlm.family:INTERNLM2",
    summary="InternLM 2 and 2.5: llama from files with fused, grouped wqkv",
)
INTERNLM3 = Component(
    build="collie_internlm.family:INTERNLM3",
    summary="InternLM 3, as transformers has it",
)

__all__ = ["INTERNLM", "INTERNLM2", "INTERNLM3"]
