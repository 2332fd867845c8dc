"""A real run on two processes of this machine, and the same on one."""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from collie_core import starter
from collie_core.config.run import RunConfig
from collie_core.doctor.finding import Finding, error, ok
from collie_core.errors import CollieError, RunError
from collie_core.parity import TOLERANCE, Comparison, Record, Sizes, record, rehearsal

STEPS = 3
GLOBAL_BATCH = 4
LIMIT_S = 60.0  # for a rank that waits for the other
HERE, LOOPBACK_S = "127.0.0.1", 5.0  # where processes of one machine meet
WAY_OUT = "look at the findings above; COLLIE_TRACEBACK=1 shows where it stopped"
MODEL = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def check() -> Iterator[Finding]:
    """Whether two processes train, and as one does. On the CPU, with gloo, whatever else there is."""
    with tempfile.TemporaryDirectory(prefix="collie-doctor-") as folder, _on_the_cpu():
        try:
            _require_loopback()
            first, second = (_train(name, Path(folder)) for name in ("dp1", "dp2"))
        except CollieError as failure:
            yield error(f"the smoke run fails: {failure}", WAY_OUT)
            return
    yield compared(first, second)


def _require_loopback() -> None:
    """Refuse what would make both processes look for each other for minutes."""
    try:
        with socket.create_server((HERE, 0)) as server:
            socket.create_connection(server.getsockname(), timeout=LOOPBACK_S).close()
    except OSError as error:
        raise RunError(
            f"this machine cannot reach itself at {HERE}: {error}; ip link set lo up, or see its firewall"
        ) from error


def compared(first: Record, second: Record) -> Finding:
    """Whether the records of a run on one and on two processes are the same."""
    found = Comparison.of(first, second, TOLERANCE["float32"])
    if not found.same:
        return error(f"two processes train otherwise than one: {found}", WAY_OUT)
    return ok(
        f"smoke run: {STEPS} steps on two processes gave the losses of one, to {found.loss:.1e} "
        f"({', '.join(f'{loss:.4f}' for loss in second.losses)})"
    )


def _train(name: str, folder: Path) -> Record:
    import torch

    sizes, config = Sizes.parse(name), RunConfig(**_sections(folder))
    written, own = folder / "run.json", folder / name
    written.write_text(json.dumps(_sections(folder)), encoding="utf-8")  # JSON is YAML
    own.mkdir()
    changes = rehearsal(config, sizes, global_batch=GLOBAL_BATCH, steps=STEPS, folder=own)
    if sizes.processes == 1 and not torch.cuda.device_count():  # that cannot be hidden from this process any more
        record(RunConfig.from_yaml(written, changes), own)
    else:
        starter.start(sizes.processes, ["verify", "parity", str(written), "--record", str(own), *changes])
    if len([*own.glob("rank-*")]) < sizes.processes:
        raise RunError("a signal ended it before it was done")
    return Record.read(own)


def _sections(folder: Path) -> Mapping[str, Any]:
    rows = folder / "rows.jsonl"
    rows.write_text("".join(f'{{"text": "{number} sheep and a dog"}}\n' for number in range(8)), encoding="utf-8")
    return {
        "model": {"config": MODEL, "dtype": "float32"},
        "tokenizer": "byte",
        "data": {"train": str(rows), "max_length": 32, "cache_dir": str(folder / "cache")},
        "parallel": {"timeout_s": LIMIT_S},
        "train": {"max_steps": STEPS, "output_dir": str(folder / "run")},
    }


@contextmanager
def _on_the_cpu() -> Iterator[None]:
    """Processes that are started inside see no GPU, and no launcher."""
    with patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            os.environ.pop(name, None)
        yield
