"""InternLM checkpoints with random weights in their own layouts, and the models by their papers' equations.

Nothing here uses a class of transformers or the code under test: names and shapes are those of the published files,
and `logits` computes in float64 from exactly these tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Config = Mapping[str, Any]
Tensors = dict[str, Tensor]

COMMON: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "use_cache": True,
    "pad_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.41.0",
}

INTERNLM: dict[str, Any] = COMMON | {
    "model_type": "internlm",
    "architectures": ["InternLMForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_internlm.InternLMForCausalLM"},
    "bias": True,
    "rotary": {"base": 10000, "type": "dynamic"},
}
INTERNLM2: dict[str, Any] = COMMON | {
    "model_type": "internlm2",
    "architectures": ["InternLM2ForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"},
    "attn_implementation": "eager",
    "num_key_value_heads": 4,
    "bias": False,
    "rope_theta": 1000000,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "pretraining_tp": 1,
}
INTERNLM3: dict[str, Any] = COMMON | {
    "model_type": "internlm3",
    "architectures": ["InternLM3ForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_internlm3.InternLM3ForCausalLM"},
    "num_key_value_heads": 2,
    "head_dim": 16,
    "bias": False,
    "qkv_bias": False,
    "attention_dropout": 0.0,
    "rope_theta": 50000000,
    "rope_scaling": {"rope_type": "dynamic", "factor": 6.0},
}


# -- files ----------------------------------------------------------------------------------------------------------


def shapes(raw: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor that a published file of this family holds."""
    hidden, middle, vocabulary = raw["hidden_size"], raw["intermediate_size"], raw["vocab_size"]
    heads, groups, width = sizes(raw)
    second = raw["model_type"] == "internlm2"
    yield ("model.tok_embeddings.weight" if second else "model.embed_tokens.weight"), (vocabulary, hidden)
    for layer in range(raw["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        if second:
            projections = {"attention.wqkv": (heads + 2 * groups) * width, "attention.wo": hidden}
            norms = ("attention_norm", "ffn_norm")
            gate, up, down = (f"feed_forward.w{number}" for number in (1, 3, 2))
        else:
            projections = {f"self_attn.{name}_proj": groups * width for name in "qkv"}
            projections |= {"self_attn.q_proj": heads * width, "self_attn.o_proj": hidden}
            norms = ("input_layernorm", "post_attention_layernorm")
            gate, up, down = (f"mlp.{name}_proj" for name in ("gate", "up", "down"))
        for name, rows in projections.items():
            yield f"{at}{name}.weight", (rows, heads * width if name.endswith("o_proj") else hidden)
            if raw["bias"]:
                yield f"{at}{name}.bias", (rows,)
        for name in norms:
            yield f"{at}{name}.weight", (hidden,)
        yield f"{at}{gate}.weight", (middle, hidden)
        yield f"{at}{up}.weight", (middle, hidden)
        yield f"{at}{down}.weight", (hidden, middle)
    yield "model.norm.weight", (hidden,)
    if not raw["tie_word_embeddings"]:
        yield ("output.weight" if second else "lm_head.weight"), (vocabulary, hidden)


def sizes(raw: Config) -> tuple[int, int, int]:
    """Query heads, key-value heads and the width of a head."""
    heads = raw["num_attention_heads"]
    return heads, raw.get("num_key_value_heads") or heads, raw.get("head_dim") or raw["hidden_size"] // heads


def random_tensors(raw: Config, seed: int = 0) -> Tensors:
    """Values of a size that makes every part of the model matter."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in shapes(raw):
        noise = torch.randn(shape, generator=generator)
        is_norm = len(shape) == 1 and name.endswith("norm.weight")
        found[name] = 1 + 0.2 * noise if is_norm else (0.08 if len(shape) == 2 else 0.2) * noise
    return found


def write(folder: Path, raw: Config, tensors: Tensors, shards: int = 1) -> None:
    """config.json and the tensors in one safetensors file, or in several with an index."""
    (folder / "config.json").write_text(json.dumps(raw, indent=2))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names, where = list(tensors), {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        own = names[number::shards]  # a layer's tensors lie in several files, which is the hard case
        save_file({name: tensors[name] for name in own}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(own, file)
    total = sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


# -- equations ------------------------------------------------------------------------------------------------------
# B batch, L sequence, D hidden, H query heads, G key-value heads, W width of a head


@torch.no_grad()
def logits(raw: Config, tensors: Tensors, ids: Tensor) -> Tensor:
    """The logits [B, L, V] of token ids [B, L] in float64."""
    named = {name: value.double() for name, value in as_llama(raw, tensors).items()}
    angles = rotation(raw, ids.shape[1])
    eps = raw["rms_norm_eps"]
    x = named["model.embed_tokens.weight"][ids]
    for layer in range(raw["num_hidden_layers"]):
        own = {key.split(".", 3)[3]: value for key, value in named.items() if key.startswith(f"model.layers.{layer}.")}
        x = x + attention(raw, own, normed(x, own["input_layernorm.weight"], eps), angles)
        y = normed(x, own["post_attention_layernorm.weight"], eps)
        gate, up = y @ own["mlp.gate_proj.weight"].T, y @ own["mlp.up_proj.weight"].T
        x = x + (gate * torch.sigmoid(gate) * up) @ own["mlp.down_proj.weight"].T  # SwiGLU, arXiv 2002.05202
    return normed(x, named["model.norm.weight"], eps) @ named["lm_head.weight"].T


def as_llama(raw: Config, tensors: Tensors) -> Tensors:
    """The same values under llama's names: `wqkv` [(G, H/G + 2, W), D] cut by the view that its authors take."""
    embedding = "model.tok_embeddings.weight" if raw["model_type"] == "internlm2" else "model.embed_tokens.weight"
    tied = {"lm_head.weight": tensors[embedding]} if raw["tie_word_embeddings"] else {}
    if raw["model_type"] != "internlm2":
        return tied | tensors
    renamed = {
        "attention.wo": "self_attn.o_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w3": "mlp.up_proj",
        "feed_forward.w2": "mlp.down_proj",
        "tok_embeddings": "embed_tokens",
        "output": "lm_head",
    }
    heads, groups, width = sizes(raw)
    found = tied
    for name, value in tensors.items():
        if ".wqkv." in name:
            packed = value.reshape(groups, heads // groups + 2, width, *value.shape[1:])
            parts = {"q": packed[:, :-2], "k": packed[:, -2], "v": packed[:, -1]}
            for letter, part in parts.items():
                new = name.replace("attention.wqkv", f"self_attn.{letter}_proj")
                found[new] = part.reshape(-1, *value.shape[1:])
            continue
        for old, new in renamed.items():
            name = name.replace(f"{old}.", f"{new}.")
        found[name] = value
    return found


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm, arXiv 1910.07467."""
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rotation(raw: Config, length: int) -> Tensor:
    """The angles [L, W/2] of rotary embedding, arXiv 2104.09864, with the family's ways to reach further."""
    width = sizes(raw)[2]
    rotary = raw.get("rotary") or {"base": raw.get("rope_theta", 10000)}
    scaling = raw.get("rope_scaling") or {}
    kind = rotary.get("type") or scaling.get("type") or scaling.get("rope_type")
    base, factor = rotary["base"], rotary.get("scaling_factor") or scaling.get("factor", 1.0)
    limit = raw["max_position_embeddings"]
    if kind == "dynamic" and length > limit:
        base = base * (factor * length / limit - (factor - 1)) ** (width / (width - 2))
    positions = torch.arange(length, dtype=torch.float64) / (factor if kind == "linear" else 1)
    return positions[:, None] * base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)


def attention(raw: Config, own: Tensors, x: Tensor, angles: Tensor) -> Tensor:
    """Causal attention [B, L, D] in which H/G query heads share a key-value head, arXiv 2305.13245."""
    heads, groups, width = sizes(raw)

    def project(letter: str, count: int) -> Tensor:  # [B, count, L, W]
        y = x @ own[f"self_attn.{letter}_proj.weight"].T + own.get(f"self_attn.{letter}_proj.bias", 0)
        return y.reshape(*x.shape[:2], count, width).transpose(1, 2)

    q, k, v = project("q", heads), project("k", groups), project("v", groups)
    q, k = rotated(q, angles), rotated(k, angles)
    k, v = (y.repeat_interleave(heads // groups, dim=1) for y in (k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(width)
    ahead = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    y = scores.masked_fill(ahead, -math.inf).softmax(-1) @ v
    y = y.transpose(1, 2).reshape(*x.shape[:2], heads * width)
    return y @ own["self_attn.o_proj.weight"].T + own.get("self_attn.o_proj.bias", 0)


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Pairs (i, i + W/2) turned by their angle."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
