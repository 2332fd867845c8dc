"""Every plugin of this repository keeps what collie-testkit demands of its kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from families import CONFIGS, PACKS, pack_reference, reference, write_family, write_pack

from collie_testkit import checks


def internlm(name: str) -> dict[str, Any]:
    """What the kit cannot know of a family whose files transformers does not read."""

    def write(folder: Path, raw: Any) -> None:
        write_family(folder, name, changes=dict(raw))

    return {
        "config": {key: value for key, value in CONFIGS[name].items() if key != "model_type"},
        "write": write,
        "stock": lambda folder: reference(folder, name),
    }


def packed(name: str) -> dict[str, Any]:
    """The config of one of `PACKS`, and its files where they have a layout of their own."""
    found: dict[str, Any] = {"config": {key: value for key, value in PACKS[name].items() if key != "model_type"}}
    if name in ("chatglm", "moss"):
        found["write"] = lambda folder, raw: write_pack(folder, name, changes=dict(raw))
        found["stock"] = lambda folder: pack_reference(folder, name)
    return found


TEXTS = (["the cat sat on it", "5"], [["the cat sat on it"], ["4", "6"]])
CHOICES = (["a", "b", "b"], ["a", "b", "a"])
SHIPPED: dict[str, dict[str, dict[str, Any]]] = {
    "optimizer": {
        "adamw": {},
        "sgd": {"options": {"momentum": 0.9}},
        "lion": {},
        "adan": {},
        "sophia": {"options": {"hessian_interval": 3}},  # two estimates in a short run
        "lomo": {},
        "adalomo": {},
        "muon": {},
        "normuon": {},
    },
    "metric": {
        "perplexity": {},
        "token-accuracy": {},
        "accuracy": {"golden": (*CHOICES, {"accuracy": 2 / 3})},
        "f1": {"golden": (*CHOICES, {"f1_micro": 2 / 3})},
        "bleu": {"golden": (["the cat sat on it"], [["the cat sat on it"]], {"bleu": 100.0})},
        "chrf": {"golden": (["the cat sat on it"], [["the cat sat on it"]], {"chrf": 100.0})},
        "rouge": {"golden": (*TEXTS, {"rouge1": 0.5})},
        "exact-match": {"golden": (*TEXTS, {"exact_match": 0.5})},
        "numeric-match": {"golden": (["#### 5", "6"], [["5"], ["7"]], {"numeric_match": 0.5})},
        "decode": {},
    },
    "model": {
        "llama": {},
        "mistral": {},
        "qwen2": {},
        "qwen3": {},
        "internlm": internlm("internlm"),
        "internlm2": internlm("internlm2"),
        "internlm3": internlm("internlm3"),
        "gemma": {},
        "gemma2": packed("gemma2"),
        "gemma3-text": packed("gemma3_text"),
        "qwen2-moe": packed("qwen2_moe"),
        "qwen3-moe": packed("qwen3_moe"),
        "chatglm": packed("chatglm")
        | {"known_failures": {"tied": "ChatGLM 2 and 3 are never tied, so their config.json must say false"}},
        "moss": packed("moss"),
    },
    "adapter": {
        "lora": {"options": {"target_modules": "all-linear"}},
        "adalora": {"options": {"target_modules": ["q_proj", "up_proj"]}},
        "ia3": {"options": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}},
        "bottleneck": {},
        "prompt_tuning": {},
        "p_tuning": {},
        "prefix_tuning": {},
        "llama_adapter": {"options": {"adapter_layers": 2}},
    },
    "server": {"http": {}},
}

for kind, names in SHIPPED.items():
    for name, material in names.items():
        globals()[f"test_{kind}_{name}"] = checks(kind, name, **material)
