"""Weights, config and tokenizer to a folder that transformers loads, whole or not at all."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from collie_core.model.files import DiskFile, OpenFile
from collie_core.model.part import Part, part_of
from collie_core.model.weights import Gathered, save, stays_whole
from collie_core.topology import Topology

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from collie_core.data.tokenizer import TokenizerFiles


def write_folder(path: Path, write: Callable[[Path], None], topology: Topology | None = None) -> None:
    """Let `write` fill a folder beside `path`, then put it in place of `path`: never a half-written one.

    With a `topology` it is collective: every rank calls `write`, and the main rank alone may put files there.
    """
    topology = topology or Topology()
    beside, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    if topology.is_main:
        for leftover in (beside, old):
            shutil.rmtree(leftover, ignore_errors=True)
        beside.mkdir(parents=True)
    try:
        write(beside)
    except BaseException:
        if topology.is_main:
            shutil.rmtree(beside, ignore_errors=True)
        raise
    if topology.is_main:
        if path.exists():
            path.rename(old)
        beside.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    topology.barrier()


def save_pretrained(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | TokenizerFiles | None,
    *,
    dtype: torch.dtype,
    topology: Topology | None = None,
    gathered: Gathered = stays_whole,
    open_file: OpenFile = DiskFile,
) -> None:
    """Write the model in `dtype` with its configs, and the tokenizer. Collective; the main rank writes.

    A model that a program handed in does not know its `topology`, so with several ranks it must be given; and it is
    written at once, whatever `open_file` is.

    Raises:
        RunError: the main rank cannot write.
    """
    part = part_of(model)
    if topology is None:
        assert part or not dist.is_initialized() or dist.get_world_size() == 1, "which rank writes?"
        topology = Topology() if part is None else part.topology
    if part is None:
        _save_handed_in(folder, model, dtype, topology, gathered)
    else:
        save(folder, model, part, gathered, dtype=dtype, open_file=open_file)

    def write_rest() -> None:
        if part is not None:
            write_configs(folder, model, part, dtype)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    topology.on_main(write_rest, failing="the model cannot be written")


def write_configs(folder: Path, model: PreTrainedModel, part: Part, dtype: torch.dtype) -> None:
    """Write config.json and generation_config.json."""
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    written = part.family.write_config(config, part.raw_config)
    (folder / "config.json").write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _save_handed_in(
    folder: Path, model: PreTrainedModel, dtype: torch.dtype, topology: Topology, gathered: Gathered
) -> None:
    """A model that a program handed in knows best what it consists of. Its ranks hold it whole, but for ZeRO-3."""
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        with gathered([tensor]) if isinstance(tensor, nn.Parameter) else nullcontext():
            if topology.is_main:
                kind = dtype if tensor.is_floating_point() else tensor.dtype
                state[name] = tensor.detach().to("cpu", kind, copy=True)

    def write() -> None:
        before = model.config.dtype
        model.config.dtype = dtype
        try:
            model.save_pretrained(folder, state_dict=state)
        finally:
            model.config.dtype = before

    topology.on_main(write, failing="the model cannot be written")
