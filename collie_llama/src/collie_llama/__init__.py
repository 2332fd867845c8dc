"""The llama, mistral and qwen families for CoLLiE. Importing this file costs neither torch nor transformers."""

from collie_core.api import Component

LLAMA = Component(
    build="collie_llama.family:LLAMA",
    summary="Llama 1 to 3 and models saved in the llama format",
)
MISTRAL = Component(
    build="collie_llama.family:MISTRAL",
    summary="Mistral, with its sliding window",
)
QWEN2 = Component(
    build="collie_llama.family:QWEN2",
    summary="Qwen 1.5, 2 and 2.5",
)
QWEN3 = Component(
    build="collie_llama.family:QWEN3",
    summary="Qwen 3, the dense models",
)

__all__ = ["LLAMA", "MISTRAL", "QWEN2", "QWEN3"]
