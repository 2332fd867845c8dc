"""The Gemma model families for CoLLiE. Importing this file costs neither torch nor transformers."""

from collie_core.api import Component

GEMMA = Component(
    build="collie_gemma.family:GEMMA",
    summary="Gemma 1",
)
GEMMA2 = Component(
    build="collie_gemma.family:GEMMA2",
    summary="Gemma 2, with its soft caps and sliding windows",
)
GEMMA3_TEXT = Component(
    build="collie_gemma.family:GEMMA3_TEXT",
    summary="Gemma 3, the models of text alone",
)

__all__ = ["GEMMA", "GEMMA2", "GEMMA3_TEXT"]
