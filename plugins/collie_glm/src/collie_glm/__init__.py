"""The ChatGLM model family for CoLLiE. Importing this file costs neither torch nor transformers."""

from collie_core.api import Component

CHATGLM = Component(
    build="collie_glm.family:CHATGLM",
    summary="ChatGLM 2 and 3, from files with fused query_key_value",
)

__all__ = ["CHATGLM"]
