"""Families that transformers contains.

Their experts stand in the files one by one, and in the model in one tensor [experts, outputs, inputs]; tensor-parallel
ranks share the inner dimension of each expert. Both are what transformers declares.
"""

from collie_core.api import StockFamily

QWEN2_MOE = StockFamily("qwen2_moe")
QWEN3_MOE = StockFamily("qwen3_moe")
