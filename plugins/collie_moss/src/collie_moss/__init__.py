"""The MOSS model family for CoLLiE. Importing this file costs neither torch nor transformers."""

from collie_core.api import Component

MOSS = Component(
    build="collie_moss.family:MOSS",
    summary="moss-moon-003 over the stock CodeGen",
)

__all__ = ["MOSS"]
