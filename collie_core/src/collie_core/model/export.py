"""Weights, config and tokenizer to a folder that transformers loads, whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder beside `path`, then put it in place of `path`: never a half-written one."""
    beside, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    for leftover in (beside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    beside.mkdir(parents=True)
    write(beside)
    if path.exists():
        path.rename(old)
    beside.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def save_pretrained(
    folder: Path,
    model: PreTrainedModel,
    state: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: torch.dtype,
) -> None:
    """Write the weights of `state` in `dtype` with the model's config, and the tokenizer."""
    weights = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    written_before = model.config.dtype
    model.config.dtype = dtype
    try:
        model.save_pretrained(folder, state_dict=weights)
    finally:
        model.config.dtype = written_before
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
