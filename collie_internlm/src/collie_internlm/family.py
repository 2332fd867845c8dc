"""InternLM 1, 2 and 3 over the stock llama. The Python code that their repositories ship is never run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from collie_core.api import Source, StockFamily
from collie_internlm.config import from_internlm, from_internlm2

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _rows(first: str, last: str) -> Callable[[PretrainedConfig], list[tuple[int, int]]]:
    """Where queries, keys or values lie in `wqkv`.

    For every key-value head it holds the g query heads that share it, then the key, then the value.
    """

    def rows(config: PretrainedConfig) -> list[tuple[int, int]]:
        heads = config.num_attention_heads // config.num_key_value_heads
        edges = {"q": 0, "k": heads, "v": heads + 1, "end": heads + 2}
        width = config.head_dim
        return [
            ((group * edges["end"] + edges[first]) * width, (group * edges["end"] + edges[last]) * width)
            for group in range(config.num_key_value_heads)
        ]

    return rows


def _weights() -> dict[str, Source]:
    """Llama's names, and where InternLM 2 keeps their values."""
    model, file = "model.layers.*.", "model.layers.*."
    found = {
        "model.embed_tokens.weight": Source("model.tok_embeddings.weight"),
        "lm_head.weight": Source("output.weight"),
        f"{model}input_layernorm.weight": Source(f"{file}attention_norm.weight"),
        f"{model}post_attention_layernorm.weight": Source(f"{file}ffn_norm.weight"),
        f"{model}mlp.gate_proj.weight": Source(f"{file}feed_forward.w1.weight"),
        f"{model}mlp.up_proj.weight": Source(f"{file}feed_forward.w3.weight"),
        f"{model}mlp.down_proj.weight": Source(f"{file}feed_forward.w2.weight"),
    }
    for kind in ("weight", "bias"):
        found[f"{model}self_attn.o_proj.{kind}"] = Source(f"{file}attention.wo.{kind}")
        for first, last in (("q", "k"), ("k", "v"), ("v", "end")):
            source = Source(f"{file}attention.wqkv.{kind}", _rows(first, last))
            found[f"{model}self_attn.{first}_proj.{kind}"] = source
    return found


INTERNLM = StockFamily("internlm", stock_type="llama", architecture="InternLMForCausalLM", translate=from_internlm)
"""InternLM 1 has llama's names, and biases on all four projections of attention."""

INTERNLM2 = StockFamily(
    "internlm2",
    stock_type="llama",
    architecture="InternLM2ForCausalLM",
    translate=from_internlm2,
    weights=_weights(),
)
"""InternLM 2 and 2.5 have names of their own, and queries, keys and values in one tensor."""

INTERNLM3 = StockFamily("internlm3")
"""InternLM 3 is in transformers."""
