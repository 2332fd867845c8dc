"""ChatGLM 2 and 3 checkpoints with random weights in their own layout, and the model by its equations.

Nothing here uses a class of transformers or the code under test: names and shapes are those of the published files,
and `logits` computes in float64 from exactly these tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Config = Mapping[str, Any]
Tensors = dict[str, Tensor]

CHATGLM: dict[str, Any] = {
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "auto_map": {"AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration"},
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "ffn_hidden_size": 96,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "hidden_size": 64,
    "kv_channels": 16,
    "layernorm_epsilon": 1e-5,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 8,
    "num_layers": 4,
    "original_rope": True,
    "padded_vocab_size": 259,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 512,
    "use_cache": True,
    "torch_dtype": "float32",
    "transformers_version": "4.30.2",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
"""The keys of a published config.json, with sizes for tests."""


def shapes(raw: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every parameter that a published file holds."""
    hidden, middle, rows = raw["hidden_size"], raw["ffn_hidden_size"], raw["padded_vocab_size"]
    queries = raw["num_attention_heads"] * raw["kv_channels"]
    fused = queries + 2 * raw["multi_query_group_num"] * raw["kv_channels"]
    yield "transformer.embedding.word_embeddings.weight", (rows, hidden)
    for layer in range(raw["num_layers"]):
        at = f"transformer.encoder.layers.{layer}."
        yield f"{at}input_layernorm.weight", (hidden,)
        yield f"{at}self_attention.query_key_value.weight", (fused, hidden)
        if raw["add_qkv_bias"]:
            yield f"{at}self_attention.query_key_value.bias", (fused,)
        yield f"{at}self_attention.dense.weight", (hidden, queries)
        yield f"{at}post_attention_layernorm.weight", (hidden,)
        yield f"{at}mlp.dense_h_to_4h.weight", (2 * middle, hidden)
        yield f"{at}mlp.dense_4h_to_h.weight", (hidden, middle)
    yield "transformer.encoder.final_layernorm.weight", (hidden,)
    yield "transformer.output_layer.weight", (rows, hidden)


def random_tensors(raw: Config, seed: int = 0) -> Tensors:
    """Values of a size that makes every part of the model matter."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in shapes(raw):
        noise = torch.randn(shape, generator=generator)
        is_norm = name.endswith("layernorm.weight")
        found[name] = 1 + 0.2 * noise if is_norm else (0.08 if len(shape) == 2 else 0.2) * noise
    return found


def write(folder: Path, raw: Config, tensors: Tensors) -> None:
    """config.json, and the tensors in one safetensors file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw, indent=2))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# -- equations ------------------------------------------------------------------------------------------------------
# B batch, L sequence, D hidden, H query heads, G groups of keys and values, W width of a head


@torch.no_grad()
def logits(raw: Config, tensors: Tensors, ids: Tensor) -> Tensor:
    """The logits [B, L, V] of token ids [B, L] in float64."""
    named = {name.removeprefix("transformer."): value.double() for name, value in tensors.items()}
    eps = raw["layernorm_epsilon"]
    x = named["embedding.word_embeddings.weight"][ids]
    for layer in range(raw["num_layers"]):
        at = f"encoder.layers.{layer}."
        own = {name.removeprefix(at): value for name, value in named.items() if name.startswith(at)}
        x = x + attention(raw, own, normed(x, own["input_layernorm.weight"], eps))
        y = normed(x, own["post_attention_layernorm.weight"], eps)
        gate, up = (y @ own["mlp.dense_h_to_4h.weight"].T).chunk(2, -1)
        x = x + (gate * torch.sigmoid(gate) * up) @ own["mlp.dense_4h_to_h.weight"].T  # SwiGLU, arXiv 2002.05202
    return normed(x, named["encoder.final_layernorm.weight"], eps) @ named["output_layer.weight"].T


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm, arXiv 1910.07467."""
    return weight * x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps)


def attention(raw: Config, own: Tensors, x: Tensor) -> Tensor:
    """Causal attention of H query heads over G groups, arXiv 1911.02150."""
    heads, groups, width = raw["num_attention_heads"], raw["multi_query_group_num"], raw["kv_channels"]
    fused = x @ own["self_attention.query_key_value.weight"].T
    fused = fused + own.get("self_attention.query_key_value.bias", torch.zeros(()))
    q = fused[..., : heads * width].unflatten(-1, (heads, width))
    k, v = fused[..., heads * width :].unflatten(-1, (2, groups, width)).unbind(-3)
    q, k = rotated(q), rotated(k)
    group_of = torch.arange(heads) // (heads // groups)
    scores = torch.einsum("bihw,bjhw->bhij", q, k[:, :, group_of]) / width**0.5
    scores = scores.masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), float("-inf"))
    mixed = torch.einsum("bhij,bjhw->bihw", scores.softmax(-1), v[:, :, group_of])
    return mixed.flatten(-2) @ own["self_attention.dense.weight"].T


def rotated(x: Tensor) -> Tensor:
    """Rotary embedding of x [B, L, heads, W]: the first half of a head is W/4 pairs, a complex number each.

    Pair p at position m turns by m / 10000^(p / (W/4)); the second half stays, arXiv 2104.09864.
    """
    turned, kept = x.chunk(2, -1)
    pairs = turned.shape[-1] // 2
    angles = torch.arange(x.shape[1]).double()[:, None] * 10000.0 ** (-torch.arange(pairs).double() / pairs)
    numbers = torch.view_as_complex(turned.unflatten(-1, (pairs, 2)).contiguous())
    numbers = numbers * torch.polar(torch.ones_like(angles), angles)[None, :, None]
    return torch.cat((torch.view_as_real(numbers).flatten(-2), kept), -1)


def as_glm(raw: Config, tensors: Tensors) -> Tensors:
    """The same values under glm's names."""
    renamed = {
        "transformer.embedding.word_embeddings.": "model.embed_tokens.",
        "transformer.encoder.final_layernorm.": "model.norm.",
        "transformer.output_layer.": "lm_head.",
        "transformer.encoder.layers.": "model.layers.",
        "self_attention.dense.": "self_attn.o_proj.",
        "mlp.dense_h_to_4h.": "mlp.gate_up_proj.",
        "mlp.dense_4h_to_h.": "mlp.down_proj.",
    }
    sizes = [raw[key] * raw["kv_channels"] for key in ("num_attention_heads", *2 * ["multi_query_group_num"])]
    found: Tensors = {}
    for name, value in tensors.items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        if "query_key_value" in name:
            for letter, part in zip("qkv", value.split(sizes), strict=True):
                found[name.replace("self_attention.query_key_value", f"self_attn.{letter}_proj")] = part
        else:
            found[name] = value
    return found
