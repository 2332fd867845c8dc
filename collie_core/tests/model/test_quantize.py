"""Quantized base weights: which layers, when they shrink, and what is said where they cannot be had."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from collie_core.errors import ModelError
from collie_core.model.quantize import quantize, replace_linear_layers

pytest.importorskip("bitsandbytes", reason="an extra of collie-core: quantization")


def tiny() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, tie_word_embeddings=False)).eval()


@pytest.mark.parametrize(("kind", "numbers_per_byte"), [("nf4", 2), ("fp4", 2), ("int8", 1)])
def test_all_linear_layers_but_the_head_shrink_when_they_move(kind: str, numbers_per_byte: int) -> None:
    model, plain = tiny(), tiny()
    replace_linear_layers(model, kind, torch.float32)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, plain.model.layers[0].mlp.up_proj.weight)
    model.to("cpu")
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear):
            weight = model.get_submodule(name).weight
            size = module.weight.numel()
            assert weight.nbytes == (4 * size if name == "lm_head" else size // numbers_per_byte), name
            assert not weight.requires_grad or name == "lm_head"
    ids = torch.arange(12)[None]
    with torch.no_grad():
        difference = (model(ids).logits - plain(ids).logits).abs().max()
    assert 0 < difference < (0.02 if kind == "int8" else 0.2)


def test_it_needs_a_cuda_device_and_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"^model\.quantization=nf4 needs a CUDA device, and this run is on cpu"):
        quantize(tiny(), "nf4", torch.device("cpu"), torch.float32)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModelError, match=r"pip install 'collie-core\[quantization\]'"):
        quantize(tiny(), "nf4", torch.device("cuda"), torch.float32)
