"""A run for the sake of its steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from collie_core import parity
from collie_core.api import RunConfig
from collie_core.rehearsal import Rehearsal


def config(folder: Path) -> RunConfig:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    (folder / "rows.jsonl").write_text('{"input": "a", "output": "b"}\n')
    sections: dict[str, Any] = {
        "model": {"config": {"model_type": "llama", **sizes}},
        "tokenizer": {"type": "byte"},
        "data": {"train": str(folder / "rows.jsonl"), "cache_dir": str(folder / "cache")},
        "train": {"max_steps": 1, "output_dir": str(folder / "run")},
    }
    return RunConfig(**sections)


def test_it_trains_and_keeps_no_model(tmp_path: Path) -> None:
    trainer = Rehearsal(config(tmp_path), observers=())
    trainer.train()
    assert trainer.run.step == 1
    assert not (tmp_path / "run" / "model").exists()


def test_a_record_of_a_topology_exports_nothing(tmp_path: Path) -> None:
    (tmp_path / "record").mkdir()
    parity.record(config(tmp_path), tmp_path / "record")
    assert any((tmp_path / "record").iterdir())
    assert not (tmp_path / "run" / "model").exists()
