"""Models that CoLLiE builds compute what transformers computes from the same folder, in every variant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from collie_core.config.model import ModelConfig
from collie_core.data.tokenizer import byte_tokenizer
from collie_core.model.build import new_model
from collie_core.plugins import Plugins

SHAPE: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": 257,
}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama, tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama, every head its own": {"model_type": "llama", "num_key_value_heads": 8},
    "llama, biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama, linear": {"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "llama, dynamic": {"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "llama, llama3": {
        "model_type": "llama",
        "rope_theta": 500000.0,
        "rope_scaling": {**LLAMA3, "factor": 8.0, "original_max_position_embeddings": 16},
    },
    "llama, yarn": {"model_type": "llama", "rope_scaling": YARN},
    "mistral": {"model_type": "mistral", "sliding_window": 8},
    "mistral, no window": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen2, tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2, window in two layers": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 2,
    },
    "qwen2, yarn": {"model_type": "qwen2", "rope_scaling": YARN},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "qwen3, tied and yarn": {
        "model_type": "qwen3",
        "head_dim": 16,
        "tie_word_embeddings": True,
        "rope_scaling": YARN,
    },
}
BEYOND = 100  # positions; the models are made for 64


def random_model(case: dict[str, Any]) -> PreTrainedModel:
    """Weights of a size that makes rotary embeddings, windows, norms and biases matter."""
    options = SHAPE | case
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(options.pop("model_type"), **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else (0.08 if parameter.ndim == 2 else 0.2) * noise)
    return model.eval()


def logits(model: PreTrainedModel, length: int) -> torch.Tensor:
    ids = torch.randint(259, (2, length), generator=torch.Generator().manual_seed(length))
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    random_model(CASES[case]).save_pretrained(tmp_path)
    section = ModelConfig(model_name_or_path=str(tmp_path))
    ours = new_model(section, Plugins.discover(), byte_tokenizer(), torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert ours.config.model_type == CASES[case]["model_type"]
    for length in (40, BEYOND):
        torch.testing.assert_close(logits(ours, length), logits(theirs, length), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("case", "plain"),
    [
        ("llama, linear", "llama"),
        ("llama, dynamic", "llama"),
        ("llama, llama3", "llama"),
        ("llama, yarn", "llama"),
        ("mistral", "mistral, no window"),
        ("qwen2, yarn", "qwen2"),
        ("qwen2, window in two layers", "qwen2"),
    ],
)
def test_the_variants_matter(case: str, plain: str) -> None:
    difference = logits(random_model(CASES[case]), BEYOND) - logits(random_model(CASES[plain]), BEYOND)
    assert difference.abs().max() > 0.05
