"""The config.json of InternLM 1 and 2 in the words of llama's config.

A key that this file does not know could change the numbers, so it is refused and not dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from collie_core.api import ModelError

SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
)
"""Keys that llama has too, with the same meaning."""

WITHOUT_EFFECT = (
    "model_type",
    "architectures",
    "auto_map",
    "attn_implementation",  # a kernel: `model.attn_implementation` chooses
    "pretraining_tp",  # how the original code splits its products; their values are the same
    "torch_dtype",
    "dtype",
    "transformers_version",
    "_name_or_path",
)
"""Keys that change no number."""

DEFAULTS: Mapping[str, Any] = {"vocab_size": 103168, "pad_token_id": 0, "bias": True}
"""What the published config classes of both families take for a missing key, where llama's differ."""

ROTARY: Mapping[str, Any] = {"type": "dynamic", "base": 10000}
"""The same for `rotary` of InternLM 1."""


def from_internlm(raw: Mapping[str, Any]) -> dict[str, Any]:
    """InternLM 1.

    Raises:
        ModelError: the file is InternLM 2's, or has a key or rotary embedding that the family does not have.
    """
    if "InternLM2" in f"{raw.get('architectures')} {raw.get('auto_map')}":
        raise ModelError(
            "config.json says model_type internlm, but its architecture is InternLM 2; set model_type to internlm2"
        )
    _refuse_unknown("internlm", raw, (*SAME, *WITHOUT_EFFECT, "bias", "rotary"))
    heads, groups = raw.get("num_attention_heads", 32), raw.get("num_key_value_heads")
    if groups not in (None, heads):
        raise ModelError(
            f"internlm: num_key_value_heads={groups} and num_attention_heads={heads}, but this family has no grouped "
            "attention; remove num_key_value_heads, or take internlm2"
        )
    rotary = {**ROTARY, **_mapping("internlm: rotary", raw.get("rotary"))}
    _refuse_unknown("internlm: rotary", rotary, ("type", "base", "scaling_factor"))
    kind = rotary["type"]
    if kind not in ("origin", "dynamic"):
        raise ModelError(f"internlm: rotary.type={kind!r} is unknown; it is origin or dynamic")
    factor = _factor("internlm: rotary.scaling_factor", rotary.get("scaling_factor", 1.0))
    return _llama(raw, _rope("default" if kind == "origin" else kind, rotary["base"], factor))


def from_internlm2(raw: Mapping[str, Any]) -> dict[str, Any]:
    """InternLM 2 and 2.5.

    Raises:
        ModelError: a key or scaling of the rotary embedding that the family does not have.
    """
    _refuse_unknown("internlm2", raw, (*SAME, *WITHOUT_EFFECT, "bias", "rope_theta", "rope_scaling"))
    base = raw.get("rope_theta", 10000)
    scaling = _mapping("internlm2: rope_scaling", raw.get("rope_scaling"))
    if not scaling:
        return _llama(raw, _rope("default", base))
    _refuse_unknown("internlm2: rope_scaling", scaling, ("type", "factor"))
    kind = scaling.get("type")
    if kind not in ("linear", "dynamic"):
        raise ModelError(f"internlm2: rope_scaling.type={kind!r} is unknown; it is linear or dynamic")
    return _llama(raw, _rope(kind, base, _factor("internlm2: rope_scaling.factor", scaling.get("factor"))))


def _llama(raw: Mapping[str, Any], rope: dict[str, Any]) -> dict[str, Any]:
    values = {**DEFAULTS, **raw}
    return {key: values[key] for key in SAME if key in values} | {
        "attention_bias": values["bias"],
        "rope_parameters": rope,
    }


def _rope(kind: str, base: float, factor: float = 1.0) -> dict[str, Any]:
    """`rope_parameters` of llama.

    Dynamic NTK is the same formula there and here. For a sequence of length L beyond `max_position_embeddings` M, and
    heads of width d, the base becomes base * (factor * L / M - factor + 1) ^ (d / (d - 2)); up to M nothing changes.
    """
    rope = {"rope_type": kind, "rope_theta": float(base)}
    return rope if kind == "default" else rope | {"factor": factor}


def _factor(where: str, value: Any) -> float:
    if not isinstance(value, int | float) or value < 1:
        raise ModelError(f"{where}={value!r} must be a number, at least 1")
    return float(value)


def _mapping(where: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ModelError(f"{where}={value!r} must be a mapping with its type")
    return dict(value)


def _refuse_unknown(where: str, found: Iterable[str], known: Iterable[str]) -> None:
    unknown = sorted(set(found) - set(known))
    if unknown:
        raise ModelError(
            f"{where}: the meaning of {', '.join(unknown)} is not known here, and could change what the model "
            "computes; remove what has no effect"
        )
