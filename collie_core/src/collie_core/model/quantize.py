"""Frozen base weights in 8 or 4 bits, through bitsandbytes, under an adapter (arXiv 2208.07339, 2305.14314).

All linear layers but the output head are quantized, each when it moves to the device, so that the device never holds
more than one of them as it was. Norms, embeddings and the adapter stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from collie_core.errors import ModelError


def quantize(model: nn.Module, kind: str, device: torch.device, dtype: torch.dtype) -> None:
    """Put quantized layers into a model, in place; they take their few bits when the model moves to the device.

    Args:
        model: a transformers model, or a pipeline stage of one.
        kind: int8, nf4 or fp4.
        device: where the model will be.
        dtype: in which the layers compute.

    Raises:
        ModelError: the device is no CUDA device, or bitsandbytes is missing.
    """
    if device.type != "cuda":
        raise ModelError(
            f"model.quantization={kind} needs a CUDA device, and this run is on {device.type}; remove it "
            "(model.dtype=bfloat16 halves the weights anywhere)"
        )
    replace_linear_layers(model, kind, dtype)


def replace_linear_layers(model: Any, kind: str, dtype: torch.dtype) -> None:
    """As `quantize`, for any device that bitsandbytes knows."""
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not head:
            model.set_submodule(name, _quantized(module, kind, dtype))
    # peft asks these to choose its own layers.
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = kind == "int8", kind != "int8"


def _quantized(linear: nn.Linear, kind: str, dtype: torch.dtype) -> nn.Module:
    bnb = _bitsandbytes()
    sizes, has_bias = (linear.in_features, linear.out_features), linear.bias is not None
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(*sizes, bias=has_bias, has_fp16_weights=False, device="meta")
        layer.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(*sizes, bias=has_bias, compute_dtype=dtype, quant_type=kind, device="meta")
        layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type=kind, module=layer)
    layer.bias = linear.bias
    layer.train(linear.training)
    return layer  # type: ignore[no-any-return]


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise ModelError(
            "model.quantization needs bitsandbytes, which is not installed: pip install 'collie-core[quantization]'"
        ) from error
    return bitsandbytes
