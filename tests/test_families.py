"""Families that other packages bring: the one beside these tests, and those that docs/plugins/ shows.

They are installed by pip into a folder, found by their entry points, and train the same divided as on one process.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from families import CONFIGS, SHAPE, read_tensors

from collie_core.api import RunConfig, Trainer

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = ROOT / "tests" / "support" / "collie_olmo2"
FILE = re.compile(r"^```\w+ file=(acme-extras/\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

GPT2 = {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 256, "embd_pdrop": 0, "attn_pdrop": 0, "resid_pdrop": 0}
STOCK = {key: value for key, value in SHAPE.items() if not key.endswith("_id") and key != "torch_dtype"}
MODELS: dict[str, dict[str, Any]] = {
    "acme-llama": {"model_type": "acme-llama", "size": "small"},
    "gpt2": {"model_type": "gpt2", **GPT2},
    "phi3": {"model_type": "phi3", **STOCK, "resid_pdrop": 0.0},
    "granite": {"model_type": "granite", **STOCK, "embedding_multiplier": 12.0, "tie_word_embeddings": True},
    "olmo2": {key: value for key, value in CONFIGS["olmo2"].items() if key != "torch_dtype"},
}


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the packages are installed."""
    folder = tmp_path_factory.mktemp("outside")
    for page in [ROOT / "docs" / "plugins.md", *(ROOT / "docs" / "plugins").glob("*.md")]:
        for file, text in FILE.findall(page.read_text()):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(text)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    packages = [str(OUTSIDE), str(folder / "acme-extras")]
    subprocess.run([*command, "--target", str(folder / "site"), *packages], check=True)
    return folder / "site"


class Record:
    """Keeps loss and gradient norm of every step."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, float]] = []

    def collie_metrics(self, values: Any) -> None:
        self.rows.append((values["loss"], values["grad_norm"]))


def train(site: Path, sizes: tuple[int, int], data: Path, output: Path) -> Any:
    """This rank's loss and gradient norm of each step, by model; sizes are tensor- and pipeline-parallel."""
    sys.path.insert(0, str(site))  # where the fork finds their entry points
    found = {}
    for name, model in MODELS.items():
        record = Record()
        config = RunConfig.model_validate(
            {
                "model": {"config": model},
                "tokenizer": "byte",
                "data": {"train": str(data), "max_length": 128, "cache_dir": str(output / "cache")},
                "parallel": {"tensor_parallel_size": sizes[0], "pipeline_parallel_size": sizes[1]},
                "train": {
                    "max_steps": 4,
                    "per_device_train_batch_size": 4,
                    "gradient_accumulation_steps": 2,
                    "output_dir": str(output / name),
                    "overwrite_output_dir": True,
                },
                "optimizer": {"type": "adamw", "lr": 1e-3},
            }
        )
        Trainer(config, callbacks=[record], observers=()).train()
        found[name] = record.rows
    return found


def distance(first: list[tuple[float, float]], second: list[tuple[float, float]]) -> float:
    assert len(first) == len(second) == 4
    rows = zip(first, second, strict=True)
    return max(abs(a - b) / max(1.0, b) for ones, others in rows for a, b in zip(ones, others, strict=True))


@pytest.fixture(scope="session")
def alone(zygote: Any, site: Path, instructions: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """All of them on one process."""
    output = tmp_path_factory.mktemp("alone")
    (found,) = zygote.run(__file__, "train", world_size=1, args=(site, (1, 1), instructions, output))
    return found


@pytest.mark.slow
def test_a_declared_family_trains_the_same_divided(
    zygote: Any, site: Path, alone: Any, instructions: Path, tmp_path: Path
) -> None:
    args = (site, (2, 2), instructions, tmp_path)
    found = zygote.run(__file__, "train", world_size=4, args=args, limit_s=250)[0]
    for name in MODELS:
        assert distance(found[name], alone[name]) <= 1e-5, name
    export = tmp_path / "acme-llama" / "model"
    assert json.loads((export / "config.json").read_text())["size"] == "small"
    assert "model.layers.1.mlp.gate_up.weight" in read_tensors(export)


def test_an_outside_package_is_small_and_found_by_its_entry_point(site: Path) -> None:
    lines = [line for file in OUTSIDE.glob("*.*") for line in file.read_text().splitlines()]
    assert len(lines) <= 40
    done = subprocess.run(
        [sys.executable, "-m", "collie_core.cli", "plugins", "show", "olmo2"],
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "collie-olmo2 1.0" in done.stdout
