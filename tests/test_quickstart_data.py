"""The shipped quickstart data is what its generator writes, and fit for the model that learns it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = ("quickstart_train.jsonl", "quickstart_eval.jsonl")


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (EXAMPLES / "data" / name).read_text(encoding="utf-8").splitlines()]


def test_the_generator_writes_the_shipped_files(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "make_quickstart_data.py"), str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    for name in NAMES:
        assert (tmp_path / name).read_bytes() == (EXAMPLES / "data" / name).read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_short_and_files_small(name: str) -> None:
    assert all(set(row) == {"input", "output"} for row in rows(name))
    assert max(len((row["input"] + row["output"]).encode()) for row in rows(name)) < 128
    assert (EXAMPLES / "data" / name).stat().st_size < 300_000


def test_held_out_questions_are_new_and_their_answers_learnable() -> None:
    train, held_out = rows(NAMES[0]), rows(NAMES[1])
    assert not {row["input"] for row in train} & {row["input"] for row in held_out}
    assert {row["output"] for row in held_out} <= {row["output"] for row in train}
