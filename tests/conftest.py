"""Fixtures of the tests that cross distributions."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT / "collie_core" / "tests" / "support")]

from combos import in_everything  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of the adapters one shows that it trains on every family; the others are left to `make everything`."""
    others = [item for item in items if item.name.endswith("[every_family]")]
    for item in others[1:]:
        item.add_marker(in_everything)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small random llama and the byte tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from collie_core.config.model import ModelConfig
    from collie_core.config.tokenizer import TokenizerConfig
    from collie_core.data.tokenizer import build_tokenizer

    folder = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = build_tokenizer(TokenizerConfig(type="byte"), ModelConfig())
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty rows of {input, output} of different lengths."""
    rows = [
        {"input": f"Count to {count}: ", "output": " ".join(str(number) for number in range(1, count + 1))}
        for count in range(1, 41)
    ]
    path = tmp_path_factory.mktemp("instructions") / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
