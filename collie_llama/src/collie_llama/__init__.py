"""The llama model family for CoLLiE. Importing this file costs neither torch nor transformers."""

from collie_core.api import Component

LLAMA = Component(
    build="collie_llama.family:FAMILY",
    summary="Llama 1 to 3 and models saved in the llama format",
)

__all__ = ["LLAMA"]
