"""Families that transformers contains: their partition, rope and masks are derived from the stock model.

Each says nothing beyond its name.
"""

from collie_core.api import StockFamily

LLAMA = StockFamily("llama")
MISTRAL = StockFamily("mistral")
QWEN2 = StockFamily("qwen2")
QWEN3 = StockFamily("qwen3")
