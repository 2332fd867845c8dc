"""Soft caps and windows are in what is built, and the attention that has them is taken unasked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from collie_core.api import Plugins
from collie_core.config.model import ModelConfig
from collie_core.data.tokenizer import byte_tokenizer
from collie_core.model.build import new_model

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
IDS = torch.arange(24)[None]


def built(name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    section = ModelConfig(config={"model_type": name, **SMALL, **changes})
    model: Any = new_model(section, Plugins.discover(), byte_tokenizer(), torch.float32)
    for parameter in model.parameters():
        parameter.data.mul_(8)  # so that caps and windows tell
    return model


@torch.no_grad()
def logits(name: str, **changes: Any) -> torch.Tensor:
    found: torch.Tensor = built(name, **changes)(IDS).logits
    return found


@pytest.mark.parametrize(("name", "kernel"), [("gemma", "sdpa"), ("gemma2", "eager"), ("gemma3_text", "sdpa")])
def test_attention_is_sdpa_where_the_model_has_it(name: str, kernel: str) -> None:
    assert built(name).config._attn_implementation == kernel


@pytest.mark.parametrize(
    "change", [{"attn_logit_softcapping": 0.5}, {"final_logit_softcapping": 1.0}, {"sliding_window": 4}]
)
def test_each_part_of_gemma_2_tells_in_the_logits(change: dict[str, float]) -> None:
    assert (logits("gemma2", **change) - logits("gemma2")).abs().max() > 1e-3
