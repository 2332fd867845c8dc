"""The config.json of ChatGLM 2 and 3 in the words of glm's config.

A key that this file does not know could change the numbers, so it is refused and not dropped.
"""

from collections.abc import Mapping
from typing import Any

from collie_core.api import ModelError

RENAMED: Mapping[str, tuple[str, Any]] = {
    "padded_vocab_size": ("vocab_size", 65024),
    "hidden_size": ("hidden_size", 4096),
    "ffn_hidden_size": ("intermediate_size", 13696),
    "num_layers": ("num_hidden_layers", 28),
    "num_attention_heads": ("num_attention_heads", 32),
    "multi_query_group_num": ("num_key_value_heads", 1),
    "kv_channels": ("head_dim", 128),
    "seq_length": ("max_position_embeddings", 2048),
    "layernorm_epsilon": ("rms_norm_eps", 1e-5),
    "add_qkv_bias": ("attention_bias", False),
    "use_cache": ("use_cache", True),
    "bos_token_id": ("bos_token_id", None),
    "eos_token_id": ("eos_token_id", 2),
    "pad_token_id": ("pad_token_id", 0),
}
"""Key -> glm's key, and what the published config class takes for a missing one."""

ONLY: Mapping[str, Any] = {
    "add_bias_linear": False, "apply_residual_connection_post_layernorm": False, "attention_dropout": 0,
    "fp32_residual_connection": False, "hidden_dropout": 0, "interleaved_qkv": False, "multi_query_attention": True,
    "original_rope": True, "post_layer_norm": True, "pre_seq_len": None, "prefix_projection": False,
    "quantization_bit": 0, "rmsnorm": True, "tie_word_embeddings": False,
    "rope_ratio": 1,  # the code of one model divides positions by it, that of another multiplies the base of the angles
}  # fmt: skip
"""Keys of which the stock class computes this value alone."""

WITHOUT_EFFECT = (
    "model_type", "architectures", "auto_map", "attention_softmax_in_fp32", "bias_dropout_fusion", "classifier_dropout",
    "apply_query_key_layer_scaling",  # scores are divided by the number of the layer, and multiplied again
    "vocab_size", "torch_dtype", "dtype", "transformers_version", "_name_or_path",
)  # fmt: skip
"""Keys that change no number."""


def from_chatglm(raw: Mapping[str, Any]) -> dict[str, Any]:
    """ChatGLM 2 and 3.

    Raises:
        ModelError: the file is that of the first ChatGLM, or says what the family cannot compute.
    """
    if "position_encoding_2d" in raw:
        raise ModelError(
            "config.json is that of the first ChatGLM-6B, for which transformers has no class; take ChatGLM 2"
        )
    if unknown := sorted(set(raw) - {*RENAMED, *ONLY, *WITHOUT_EFFECT}):
        raise ModelError(
            f"chatglm: the meaning of {', '.join(unknown)} is not known here, and could change what the model "
            "computes; remove what has no effect"
        )
    for key, value in ONLY.items():
        if raw.get(key, value) != value:
            raise ModelError(f"chatglm: {key}={raw[key]!r} is not supported; it must be {value!r}")
    found = {name: raw.get(key, default) for key, (name, default) in RENAMED.items()}
    if raw.get("vocab_size", found["vocab_size"]) != found["vocab_size"]:
        raise ModelError(
            f"chatglm: vocab_size={raw['vocab_size']} is not padded_vocab_size={found['vocab_size']}, the rows; "
            "set both to the same (model.resize_vocabulary is not supported)"
        )
    return {**found, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
