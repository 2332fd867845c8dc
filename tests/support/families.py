"""Tiny checkpoints of every model family, in the layout of its own files, with random weights.

    write_family(folder, "internlm2_tied", shards=3)
    expected = reference(folder, "internlm2_tied")(ids).logits

`reference` never uses CoLLiE: it is `from_pretrained`, and for InternLM 1 and 2, whose files transformers does not
read, the stock llama filled by hand from the raw tensors.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
for pack in ("collie_internlm", "plugins/collie_glm", "plugins/collie_moss"):
    sys.path.append(str(ROOT / pack / "tests" / "support"))

import glm_files  # noqa: E402
import internlm_files  # noqa: E402
import moss_files  # noqa: E402

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHAPE: dict[str, Any] = {
    "vocab_size": 259,  # of the byte tokenizer; odd, so that no number of ranks divides it
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": 257,
    "torch_dtype": "float32",
}
_MANY_HEADS = {key: value for key, value in SHAPE.items() if key != "num_key_value_heads"}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": SHAPE | {"model_type": "llama", "num_hidden_layers": 5, "rope_theta": 500000.0},
    "llama_tied": SHAPE | {"model_type": "llama", "tie_word_embeddings": True},
    "llama1": _MANY_HEADS | {"model_type": "llama", "rms_norm_eps": 1e-6},
    "mistral": SHAPE | {"model_type": "mistral", "sliding_window": 8},
    "qwen2": SHAPE | {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": SHAPE | {"model_type": "qwen3", "head_dim": 16},
    "internlm": internlm_files.INTERNLM | _MANY_HEADS,
    "internlm2": internlm_files.INTERNLM2 | SHAPE,
    "internlm2_tied": internlm_files.INTERNLM2 | SHAPE | {"tie_word_embeddings": True, "bias": True},
    "internlm3": internlm_files.INTERNLM3 | SHAPE,
    "olmo2": SHAPE | {"model_type": "olmo2"},  # its family comes from collie_olmo2, beside this file
}
"""config.json by name."""

_GEMMA = SHAPE | {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 8, "tie_word_embeddings": True}
_EXPERTS = SHAPE | {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [2]}

PACKS: dict[str, dict[str, Any]] = {
    "gemma2": _GEMMA | {"model_type": "gemma2", "attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0},
    "gemma3_text": _GEMMA | {"model_type": "gemma3_text", "sliding_window_pattern": 2},
    "qwen3_moe": _EXPERTS | {"model_type": "qwen3_moe", "head_dim": 16, "norm_topk_prob": True},
    "qwen2_moe": _EXPERTS | {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 48},
    "chatglm": glm_files.CHATGLM,
    "moss": moss_files.MOSS,
}
"""The same of the families in `plugins/`, which are trained on fewer topologies."""

BY_HAND = ("internlm", "internlm2")
"""Model types of `CONFIGS` whose files transformers cannot read."""


def write_family(
    folder: Path, name: str, seed: int = 0, shards: int = 1, changes: dict[str, Any] | None = None
) -> None:
    """Write config.json, the byte tokenizer and random weights; norms and biases are not 1 and 0."""
    from collie_core.data.tokenizer import byte_tokenizer

    raw = CONFIGS[name] | (changes or {})
    folder.mkdir(parents=True, exist_ok=True)
    byte_tokenizer().save_pretrained(folder)
    tensors = internlm_files.random_tensors(raw, seed) if raw["model_type"] in BY_HAND else _stock_tensors(raw, seed)
    internlm_files.write(folder, raw, tensors, shards)


def reference(folder: Path, name: str) -> PreTrainedModel:
    """The model of a folder that `write_family` wrote, in float32, for evaluation."""
    from transformers import AutoModelForCausalLM

    if CONFIGS[name]["model_type"] in BY_HAND:
        return llama_by_hand(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def llama_by_hand(folder: Path) -> PreTrainedModel:
    """The stock llama with the values of InternLM 1 or 2."""
    from transformers import LlamaConfig, LlamaForCausalLM

    raw = json.loads((folder / "config.json").read_text())
    config = LlamaConfig(
        **{key: raw[key] for key in SHAPE if key in raw and key != "torch_dtype"},
        attention_bias=raw["bias"],
        rope_parameters={
            "rope_type": "dynamic",
            "rope_theta": raw.get("rope_theta", 10000.0),
            "factor": (raw.get("rope_scaling") or {"factor": 1.0})["factor"],
        },
    )
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(internlm_files.as_llama(raw, read_tensors(folder)))
    return model


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the safetensors files of a folder."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def _stock_tensors(raw: dict[str, Any], seed: int) -> dict[str, Tensor]:
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {key: value for key, value in raw.items() if key != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(raw["model_type"], **options))
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, parameter in model.named_parameters():  # a tied head is named once, by the embedding
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm = parameter.ndim == 1 and "norm" in name
        found[name] = 1 + 0.2 * noise if is_norm else (0.08 if parameter.ndim == 2 else 0.2) * noise
    return found


def write_pack(folder: Path, name: str, changes: dict[str, Any] | None = None) -> None:
    """The same as `write_family` for one of `PACKS`, in the layout of its published files."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from collie_core.data.tokenizer import byte_tokenizer

    raw = PACKS[name] | (changes or {})
    if files := {"chatglm": glm_files, "moss": moss_files}.get(name):
        files.write(folder, raw, files.random_tensors(raw))
    else:
        options = {key: value for key, value in raw.items() if key not in ("model_type", "torch_dtype")}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(raw["model_type"], **options))
        model.load_state_dict(_stock_tensors(raw, 0), strict=False)  # a tied head is not among them
        model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def pack_reference(folder: Path, name: str) -> PreTrainedModel:
    """The same as `reference` for one of `PACKS`."""
    from transformers import AutoModelForCausalLM, GlmConfig, GlmForCausalLM

    if name == "moss":
        return moss_files.stock(folder)
    if name != "chatglm":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    raw = json.loads((folder / "config.json").read_text())
    config = GlmConfig(
        vocab_size=raw["padded_vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["ffn_hidden_size"],
        num_hidden_layers=raw["num_layers"],
        num_attention_heads=raw["num_attention_heads"],
        num_key_value_heads=raw["multi_query_group_num"],
        head_dim=raw["kv_channels"],
        max_position_embeddings=raw["seq_length"],
        rms_norm_eps=raw["layernorm_epsilon"],
        eos_token_id=raw["eos_token_id"],
        pad_token_id=raw["pad_token_id"],
    )
    model = GlmForCausalLM(config).eval()
    model.load_state_dict(glm_files.as_glm(raw, read_tensors(folder)))
    return model
