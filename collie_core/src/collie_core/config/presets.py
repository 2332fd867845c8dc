"""The configurations that `collie init` writes. Their comments are the descriptions of the fields."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

from pydantic import BaseModel

from collie_core.config.loading import dump_value
from collie_core.config.problems import Guide
from collie_core.config.run import RunConfig
from collie_core.plugins import Plugins

WIDTH = 100


@dataclass(frozen=True)
class Preset:
    """What to write, and what the person has to bring."""

    summary: str
    data_hint: str
    sections: Mapping[str, Any]


_PAIRS = 'put samples into data/train.jsonl and data/eval.jsonl, one per line: {"input": "...", "output": "..."}'
_TEXTS = 'put documents into data/train.jsonl and data/eval.jsonl, one per line: {"text": "..."}'
_FILES = {"train": "data/train.jsonl", "eval": "data/eval.jsonl"}
_PRETRAINED = {"model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct", "dtype": "auto"}
_TINY_LLAMA = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
_SMALL_LLAMA = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
}

PRESETS: Mapping[str, Preset] = {
    "quickstart": Preset(
        "a llama of about one million parameters from random weights, on a CPU, in a minute or two",
        _PAIRS,
        {
            "model": {"config": _TINY_LLAMA},
            "tokenizer": {"type": "byte"},
            "data": {**_FILES, "max_length": 128},
            "train": {
                "max_steps": 500,
                "per_device_train_batch_size": 16,
                "seed": 42,
                "logging_steps": 10,
                "output_dir": "runs/quickstart",
                "overwrite_output_dir": True,
            },
            "optimizer": {"type": "adamw", "lr": 3e-3, "weight_decay": 0.01},
            "lr_scheduler": {"type": "cosine", "warmup_ratio": 0.05},
            "evaluation": {"steps": 100, "on_start": True, "print_samples": 3},
        },
    ),
    "finetune": Preset(
        "all weights of a pretrained model, on instructions and answers",
        _PAIRS,
        {
            "model": {**_PRETRAINED, "gradient_checkpointing": "none"},
            "data": {**_FILES, "max_length": 1024, "packing": True, "train_on": "auto"},
            "train": {
                "num_train_epochs": 3,
                "per_device_train_batch_size": 4,
                "global_batch_size": 16,
                "max_grad_norm": 1.0,
                "seed": 42,
                "logging_steps": 10,
                "output_dir": "runs/finetune",
            },
            "optimizer": {"type": "adamw", "lr": 2e-5, "weight_decay": 0.0},
            "lr_scheduler": {"type": "cosine", "warmup_ratio": 0.03},
            "evaluation": {"steps": 100},
        },
    ),
    "lora": Preset(
        "a few added weights (LoRA) of a pretrained model, on instructions and answers",
        _PAIRS,
        {
            "model": _PRETRAINED,
            "adapter": {"type": "lora", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
            "data": {**_FILES, "max_length": 1024, "packing": True, "train_on": "auto"},
            "train": {
                "num_train_epochs": 3,
                "per_device_train_batch_size": 4,
                "global_batch_size": 16,
                "seed": 42,
                "logging_steps": 10,
                "output_dir": "runs/lora",
            },
            "optimizer": {"type": "adamw", "lr": 2e-4},
            "lr_scheduler": {"type": "cosine", "warmup_ratio": 0.03},
            "evaluation": {"steps": 100},
        },
    ),
    "pretrain": Preset(
        "a llama of about 60 million parameters from random weights, on plain text",
        _TEXTS,
        {
            "model": {"config": _SMALL_LLAMA, "dtype": "auto"},
            "tokenizer": {"type": "pretrained", "name_or_path": "HuggingFaceTB/SmolLM2-135M"},
            "data": {**_FILES, "max_length": 1024, "packing": True, "long_samples": "split"},
            "train": {
                "max_steps": 10000,
                "per_device_train_batch_size": 8,
                "global_batch_size": 64,
                "max_grad_norm": 1.0,
                "seed": 42,
                "logging_steps": 10,
                "output_dir": "runs/pretrain",
            },
            "optimizer": {"type": "adamw", "lr": 6e-4, "betas": [0.9, 0.95], "weight_decay": 0.1},
            "lr_scheduler": {"type": "cosine", "warmup_steps": 500},
            "evaluation": {"steps": 500},
            "report_to": ["tensorboard"],
        },
    ),
}


def render(name: str, data: Mapping[str, str] = _FILES) -> str:
    """The commented YAML of a preset; `data` are its files."""
    preset = PRESETS[name]
    sections = {**preset.sections, "data": {**preset.sections["data"], **data}}
    guide = Guide(RunConfig, Plugins.discover())
    lines = [
        *_comment(f"CoLLiE: {preset.summary}."),
        *_comment("Keys that are not written have their defaults: `collie schema` describes all of them."),
    ]
    for key, section in sections.items():
        lines.append("")
        description = RunConfig.model_fields[key].description or ""
        if isinstance(section, Mapping):
            lines += [f"{key}:  # {description}", *_fields(section, guide.model([key], sections))]
        else:
            lines += _line(key, section, description, "")
    return "\n".join([*lines, ""])


def _fields(section: Mapping[str, Any], model: type[BaseModel] | None) -> Iterator[str]:
    for name, value in section.items():
        field = model.model_fields.get(name) if model else None
        yield from _line(name, value, (field.description if field else None) or "", "  ")


def _line(name: str, value: Any, description: str, indent: str) -> Iterator[str]:
    """`name: value  # description` where it fits, else with the description above."""
    nested = isinstance(value, Mapping)
    written = f"{indent}{name}:" if nested else f"{indent}{name}: {dump_value(value)}"
    commented = f"{written}  # {description}"
    if not description or len(commented) <= WIDTH:
        yield commented if description else written
    else:
        yield from _comment(description, indent)
        yield written
    if nested:
        yield from _fields_of_mapping(value, indent + "  ")


def _fields_of_mapping(value: Mapping[str, Any], indent: str) -> Iterator[str]:
    for name, item in value.items():
        yield from _line(name, item, "", indent)


def _comment(text: str, indent: str = "") -> list[str]:
    return [f"{indent}# {line}" for line in wrap(text, WIDTH - len(indent) - 2)]
