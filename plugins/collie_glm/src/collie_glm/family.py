"""ChatGLM 2 and 3 over the stock glm. The Python code that repositories ship is never run."""

from __future__ import annotations

from typing import Any

from collie_core.api import Source, StockFamily
from collie_glm.config import from_chatglm


def _rows(part: int) -> Any:
    """Where queries (0), keys (1) or values (2) lie in `query_key_value`: one after another."""

    def rows(config: Any) -> list[tuple[int, int]]:
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        edges = (0, queries, queries + keys, queries + 2 * keys)
        return [(edges[part], edges[part + 1])]

    return rows


def _weights() -> dict[str, Source]:
    """Glm's names, and where ChatGLM 2 and 3 keep their values."""
    model, file = "model.layers.*.", "transformer.encoder.layers.*."
    found = {
        "model.embed_tokens.weight": Source("transformer.embedding.word_embeddings.weight"),
        "model.norm.weight": Source("transformer.encoder.final_layernorm.weight"),
        "lm_head.weight": Source("transformer.output_layer.weight"),
        f"{model}input_layernorm.weight": Source(f"{file}input_layernorm.weight"),
        f"{model}post_attention_layernorm.weight": Source(f"{file}post_attention_layernorm.weight"),
        f"{model}self_attn.o_proj.weight": Source(f"{file}self_attention.dense.weight"),
        f"{model}mlp.gate_up_proj.weight": Source(f"{file}mlp.dense_h_to_4h.weight"),
        f"{model}mlp.down_proj.weight": Source(f"{file}mlp.dense_4h_to_h.weight"),
    }
    for number, part in enumerate("qkv"):
        for kind in ("weight", "bias"):
            source = Source(f"{file}self_attention.query_key_value.{kind}", _rows(number))
            found[f"{model}self_attn.{part}_proj.{kind}"] = source
    return found


CHATGLM = StockFamily(
    "chatglm",
    stock_type="glm",
    architecture="ChatGLMModel",
    translate=from_chatglm,
    weights=_weights(),
    # Transformers shares these two with their outputs and inputs whole.
    tensor_plan={"model.layers.*.mlp.gate_up_proj": "packed_colwise:2", "model.layers.*.mlp.down_proj": "rowwise"},
    computed=("transformer.rotary_pos_emb.inv_freq",),
)
"""ChatGLM 2 and 3: glm's equations, rotary embeddings of pairs in the first half of a head among them."""
