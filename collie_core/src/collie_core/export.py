"""What a run has trained, into a folder: the model in the transformers format, or the adapter alone in peft's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from collie_core.model.adapters import whole_of_part, whole_state
from collie_core.model.build import ADAPTER, describe_adapter
from collie_core.model.export import save_pretrained
from collie_core.model.files import DiskFile, OpenFile
from collie_core.storage import put_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from collie_core.config.base import AdapterConfig
    from collie_core.parts import Parts


def write_trained(parts: Parts, folder: Path, open_file: OpenFile = DiskFile) -> None:
    """Fill a folder; large files are opened by `open_file`. Collective; the main rank writes.

    Raises:
        RunError: it cannot; on every rank.
    """
    if parts.config.adapter is not None:
        _write_adapter(parts, parts.config.adapter, folder)
        return
    save_pretrained(
        folder,
        cast("PreTrainedModel", parts.model),
        parts.tokenizer_files,
        dtype=parts.dtype,
        topology=parts.topology,
        gathered=parts.gathered,
        open_file=open_file,
    )


def put_trained(folder: Path, url: str) -> None:
    """Copy what was written to a store; the file without which nobody reads it comes last.

    Raises:
        StorageError: it cannot be written.
    """
    put_folder(folder, url, last=ADAPTER if (folder / ADAPTER).exists() else "config.json")


def _write_adapter(parts: Parts, adapter: AdapterConfig, folder: Path) -> None:
    config, state = parts.config, whole_state(parts.model, parts.gathered)

    def write() -> None:
        config.registry.load("adapter", adapter.type).save(whole_of_part(parts.model), folder, state)
        base = str(config.model.model_name_or_path or "")
        describe_adapter(folder, adapter.type, base, parts.vocabulary, adapter.name or "")
        parts.tokenizer_files.save_pretrained(folder)

    parts.topology.on_main(write, failing="the adapter cannot be written")
