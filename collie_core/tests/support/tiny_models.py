"""Small random models of several families, saved as transformers saves them, or in a layout of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from collie_core.model.family import Source, StockFamily

LLAMA: dict[str, Any] = {
    "vocab_size": 37,  # odd, so that no number of ranks divides it
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
GPT2 = {"vocab_size": 37, "n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 32, "bos_token_id": 1}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "llama_tied": ("llama", LLAMA | {"tie_word_embeddings": True}),
    "llama_one_kv_head": ("llama", LLAMA | {"num_key_value_heads": 1}),
    "qwen2": ("qwen2", LLAMA | {"tie_word_embeddings": True}),
    "mixtral": ("mixtral", LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "phi3": ("phi3", LLAMA),
    "glm4_moe": (
        "glm4_moe",
        LLAMA
        | {
            "head_dim": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "first_k_dense_replace": 1,
        },
    ),
    "gpt2": ("gpt2", GPT2),
    "fused": ("llama", LLAMA),
}


def _rows(which: str) -> Any:
    """Of a matrix with the queries, key and value of one group of heads after those of another."""

    def rows(config: Any) -> list[tuple[int, int]]:
        size = config.hidden_size // config.num_attention_heads
        queries = config.num_attention_heads // config.num_key_value_heads
        begin, end = {"q": (0, queries), "k": (queries, queries + 1), "v": (queries + 1, queries + 2)}[which]
        groups = range(0, config.num_key_value_heads * (queries + 2), queries + 2)
        return [((group + begin) * size, (group + end) * size) for group in groups]

    return rows


LAYER = "model.layers.*."
FUSED = StockFamily(
    "fused",
    stock_type="llama",
    weights={
        "model.embed_tokens.weight": Source("embeddings"),
        f"{LAYER}self_attn.q_proj.weight": Source("blocks.*.wqkv", _rows("q")),
        f"{LAYER}self_attn.k_proj.weight": Source("blocks.*.wqkv", _rows("k")),
        f"{LAYER}self_attn.v_proj.weight": Source("blocks.*.wqkv", _rows("v")),
        f"{LAYER}self_attn.o_proj.weight": Source("blocks.*.wo"),
    },
)
"""Llama whose files have query, key and value in one matrix, group by group."""


def family_of(name: str) -> StockFamily:
    """The family of one of `CONFIGS`."""
    return FUSED if name == "fused" else StockFamily(CONFIGS[name][0])


def config_of(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The stock config of one of `CONFIGS`."""
    model_type, options = CONFIGS[name]
    config = AutoConfig.for_model(model_type, **options)
    config.dtype = dtype
    return config


def write(folder: Path, name: str, max_shard_size: str = "1GB", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Save one of `CONFIGS` with random weights, none of them special; returns the model."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config_of(name), dtype=dtype).eval()
    with torch.no_grad():
        for value in model.state_dict().values():  # a router's correction is a buffer
            value.normal_()
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if name == "fused":
        save_file(_fused(load_file(folder / "model.safetensors"), model.config), folder / "model.safetensors")
        raw = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(raw | {"model_type": "fused"}))
    return model


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Everything in the safetensors of a folder."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def _fused(stock: dict[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
    renamed = {"model.embed_tokens.weight": "embeddings"}
    written = {}
    for name, value in stock.items():
        if "q_proj" in name:
            groups = config.num_key_value_heads
            parts = [
                stock[name.replace("q_proj", leaf)].unflatten(0, (groups, -1))
                for leaf in ("q_proj", "k_proj", "v_proj")
            ]
            written[f"blocks.{name.split('.')[2]}.wqkv"] = torch.cat(parts, dim=1).flatten(0, 1)
        elif "o_proj" in name:
            written[f"blocks.{name.split('.')[2]}.wo"] = value
        elif "k_proj" not in name and "v_proj" not in name:
            written[renamed.get(name, name)] = value
    return {name: value.contiguous() for name, value in written.items()}
