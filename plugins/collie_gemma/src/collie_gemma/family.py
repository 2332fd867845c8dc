"""Families that transformers contains: soft caps, windows, scales and partition are those of the stock model.

Each says nothing beyond its name.
"""

from collie_core.api import StockFamily

GEMMA = StockFamily("gemma")
GEMMA2 = StockFamily("gemma2")
GEMMA3_TEXT = StockFamily("gemma3_text")
