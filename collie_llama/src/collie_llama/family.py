"""Llama is stock: transformers contains it, and its partition is derived from the model."""

from collie_core.api import StockFamily

FAMILY = StockFamily("llama")
