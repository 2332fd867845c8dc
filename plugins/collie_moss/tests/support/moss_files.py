"""moss-moon-003 checkpoints with random weights: names and shapes are those of the published files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CodeGenConfig, CodeGenForCausalLM

Config = Mapping[str, Any]
Tensors = dict[str, Tensor]

MOSS: dict[str, Any] = {
    "model_type": "moss",
    "architectures": ["MossForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_moss.MossForCausalLM"},
    "activation_function": "gelu_new",
    "attn_pdrop": 0.0,
    "bos_token_id": 256,
    "embd_pdrop": 0.0,
    "eos_token_id": 256,
    "gradient_checkpointing": False,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-5,
    "n_ctx": 512,
    "n_embd": 128,
    "n_head": 16,  # 4 blocks of 4
    "n_inner": None,
    "n_layer": 4,
    "n_positions": 512,
    "resid_pdrop": 0.0,
    "rotary_dim": 4,  # half of a head
    "scale_attn_weights": True,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50, "temperature": 1.0}},
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.25.1",
    "use_cache": True,
    "vocab_size": 259,
}
"""The keys of a published config.json, with sizes for tests."""


def shapes(raw: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every parameter that a published file holds."""
    hidden, rows = raw["n_embd"], raw["vocab_size"]
    inner = raw["n_inner"] or 4 * hidden
    yield "transformer.wte.weight", (rows, hidden)
    for layer in range(raw["n_layer"]):
        at = f"transformer.h.{layer}."
        yield f"{at}ln_1.weight", (hidden,)
        yield f"{at}ln_1.bias", (hidden,)
        yield f"{at}attn.qkv_proj.weight", (3 * hidden, hidden)
        yield f"{at}attn.out_proj.weight", (hidden, hidden)
        yield f"{at}mlp.fc_in.weight", (inner, hidden)
        yield f"{at}mlp.fc_in.bias", (inner,)
        yield f"{at}mlp.fc_out.weight", (hidden, inner)
        yield f"{at}mlp.fc_out.bias", (hidden,)
    yield "transformer.ln_f.weight", (hidden,)
    yield "transformer.ln_f.bias", (hidden,)
    if not raw["tie_word_embeddings"]:
        yield "lm_head.weight", (rows, hidden)
    yield "lm_head.bias", (rows,)


def random_tensors(raw: Config, seed: int = 0) -> Tensors:
    """Values of a size that makes every part of the model matter."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in shapes(raw):
        noise = torch.randn(shape, generator=generator)
        is_norm = ".ln_" in name and name.endswith("weight")
        found[name] = 1 + 0.2 * noise if is_norm else (0.08 if len(shape) == 2 else 0.2) * noise
    return found


def masks(raw: Config) -> Tensors:
    """What published files hold beside the parameters."""
    length = raw["n_positions"]
    mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    return {f"transformer.h.{layer}.attn.causal_mask": mask.clone() for layer in range(raw["n_layer"])}


def write(folder: Path, raw: Config, tensors: Tensors) -> None:
    """config.json, and the tensors in one safetensors file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw, indent=2))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def stock(folder: Path) -> CodeGenForCausalLM:
    """The CodeGen of transformers with the values of a folder."""
    raw = json.loads((folder / "config.json").read_text())
    sizes = ("vocab_size", "n_positions", "n_ctx", "n_embd", "n_layer", "n_head", "n_inner", "rotary_dim")
    names = (*sizes, "layer_norm_epsilon", "bos_token_id", "eos_token_id", "tie_word_embeddings")
    model: CodeGenForCausalLM = CodeGenForCausalLM(CodeGenConfig(**{name: raw[name] for name in names})).eval()
    tensors = {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}
    tied = {"lm_head.weight": tensors["transformer.wte.weight"]} if raw["tie_word_embeddings"] else {}
    model.load_state_dict(tied | {name: value for name, value in tensors.items() if not name.endswith("causal_mask")})
    return model
