"""MOSS (moss-moon-003) over the stock CodeGen. The Python code that its repositories ship is never run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from collie_core.api import ModelError, Source, StockFamily

DEFAULTS: Mapping[str, Any] = {"vocab_size": 107008, "bos_token_id": 106028, "eos_token_id": 106068}
"""What the published config class takes for a missing key, where CodeGen's differs."""

SAME = (
    *DEFAULTS,
    "n_positions",
    "n_ctx",
    "n_embd",
    "n_layer",
    "n_head",
    "n_inner",
    "rotary_dim",
    "activation_function",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "layer_norm_epsilon",
    "initializer_range",
    "use_cache",
    "pad_token_id",
    "tie_word_embeddings",
)
"""Keys that CodeGen has too, with the same meaning."""

WITHOUT_EFFECT = (
    "model_type",
    "architectures",
    "auto_map",
    "gradient_checkpointing",
    "groupsize",  # of quantized files, which say wbits
    "scale_attn_weights",  # the published code reads it nowhere
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
    "task_specific_params",
    "tokenizer_class",
    "torch_dtype",
    "dtype",
    "transformers_version",
    "_name_or_path",
)
"""Keys that change no number."""


def from_moss(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of moss-moon-003 in the words of CodeGen's.

    Raises:
        ModelError: a key that could change the numbers is not known here, or the weights are quantized.
    """
    if unknown := sorted(set(raw) - {*SAME, *WITHOUT_EFFECT, "wbits"}):
        raise ModelError(
            f"moss: the meaning of {', '.join(unknown)} is not known here, and could change what the model computes; "
            "remove what has no effect"
        )
    if raw.get("wbits", 32) not in (16, 32):
        raise ModelError(f"moss: wbits={raw['wbits']} says that weights are quantized; take those of moss-moon-003-sft")
    return {**DEFAULTS, **{key: raw[key] for key in SAME if key in raw}}


MOSS = StockFamily(
    "moss",
    stock_type="codegen",
    architecture="MossForCausalLM",
    translate=from_moss,
    weights={"lm_head.weight": Source("lm_head.weight")},  # all names in the files are CodeGen's
    computed=("transformer.h.*.attn.causal_mask",),
    tensor_plan={
        # Heads lie in 4 blocks, each with its queries, then values, then keys.
        "transformer.h.*.attn.qkv_proj": "packed_colwise:12",
        "transformer.h.*.attn.out_proj": "packed_rowwise:4",
        "transformer.h.*.mlp.fc_in": "colwise",
        "transformer.h.*.mlp.fc_out": "rowwise",
    },
    divided={"transformer.h.*.attn": ("num_attention_heads",)},
    stubs={"h": "tuple"},
)
"""moss-moon-003: only its config.json is its own; transformers does not say how ranks share a CodeGen."""
