"""Memory of loading and saving a checkpoint, for every rank of several topologies, against `from_pretrained`.

A random llama of about 190 million parameters (390 MB in bfloat16) is loaded in float32, in which training keeps its
weights, and exported in bfloat16. Each rank is a process of its own. What counts is memory that is its own (RssAnon):
the peak above what the framework takes by itself, measured after a tiny model went the same way. Pages of the mapped
file are not counted, since the system takes them back at will. A rank's share is the bytes of the weights that it
keeps. The bars: a peak of at most 1.15 shares while loading, and of two of the largest tensors while saving.

    python benchmarks/loading.py [--write benchmarks/results/loading.md]
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

MAX_SHARES, MAX_TENSORS = 1.15, 2.0
MIB = 1 << 20
SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 10,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 2048,
}
TINY = SHAPE | {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
TOPOLOGIES: dict[str, dict[str, int]] = {
    "one process": {},
    "tensor parallel 2": {"tensor_parallel_size": 2},
    "pipeline 2": {"pipeline_parallel_size": 2},
    "tensor parallel 2 x pipeline 2": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
    "ZeRO-3 of 2": {"zero_stage": 3, "data_parallel_size": 2},
}
REFERENCE = "from_pretrained, whole on every rank"


def write_checkpoint(folder: Path, shape: dict[str, int]) -> None:
    """A random llama in bfloat16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape)).bfloat16()
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    model.save_pretrained(folder)


# -- one rank -----------------------------------------------------------------------------------------------------


def own_memory() -> int:
    """Bytes that this process shares with no file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon")


@contextmanager
def peak() -> Iterator[list[float]]:
    """Fills a list with the highest own memory inside, and how many seconds it took."""
    result: list[float] = []
    highest, done = own_memory(), threading.Event()

    def watch() -> None:  # copies of tensors give the interpreter free, so this sees their middle
        nonlocal highest
        while not done.wait(0.001):
            highest = max(highest, own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    yield result
    result.append(time.perf_counter() - began)
    done.set()
    watcher.join()
    result.insert(0, max(highest, own_memory()))


def settled_memory() -> int:
    """Own memory once everything that is free has been given back."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return own_memory()


class Reference:
    """transformers by itself."""

    def load(self, folder: Path) -> Any:
        import torch
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def save(self, model: Any, folder: Path) -> None:
        import torch

        model.save_pretrained(folder, state_dict={name: t.to(torch.bfloat16) for name, t in model.state_dict().items()})


class Ours:
    """One rank of a topology."""

    def __init__(self, parallel: dict[str, int]) -> None:
        import torch

        from collie_core.config.parallel import ParallelConfig
        from collie_core.topology import Topology

        self.parallel = ParallelConfig(**parallel)
        self.topology = Topology.start(self.parallel)
        self.store = None
        if self.parallel.zero_stage == 3:
            from collie_core.engine.deepspeed_config import deepspeed_config
            from collie_core.engine.zero3 import Zero3Store

            config = deepspeed_config(
                parallel=self.parallel,
                dtype=torch.float32,
                micro_batch_size=1,
                data_parallel_size=self.topology.dp.size,
                max_grad_norm=None,
                overrides={},
            )
            self.store = Zero3Store(self.topology, config, torch.float32)

    def load(self, folder: Path) -> Any:
        """See `build_model`."""
        import torch
        from transformers import AutoConfig

        from collie_core.model.build import build_model
        from collie_core.model.family import StockFamily

        config = AutoConfig.from_pretrained(folder)
        config.dtype = torch.float32
        options: dict[str, Any] = {"topology": self.topology, "parallel": self.parallel, "store": self.store}
        return build_model(StockFamily("llama"), config, str(folder), **options)

    def save(self, model: Any, folder: Path) -> None:
        """See `save_pretrained`."""
        import torch

        from collie_core.model.export import save_pretrained
        from collie_core.model.weights import stays_whole

        gathered: Any = stays_whole
        if self.store is not None:
            from collie_core.engine.zero3 import gathered_on_first

            gathered = partial(gathered_on_first, axis=self.topology.dp, device=self.topology.device)
        save_pretrained(folder, model, None, dtype=torch.bfloat16, topology=self.topology, gathered=gathered)


def share_of(model: Any) -> int:
    """Bytes of the weights that this rank keeps."""
    own = [getattr(parameter, "ds_tensor", parameter) for parameter in model.parameters()]
    return sum(tensor.numel() * tensor.element_size() for tensor in own)


def be_rank(name: str, folder: Path) -> None:
    """Measure, and print one line of JSON."""
    contender: Any = Reference() if name == REFERENCE else Ours(TOPOLOGIES[name])
    tiny = contender.load(folder / "tiny")
    contender.save(tiny, _made(folder / "tiny-again"))
    del tiny
    before = settled_memory()
    with peak() as loading:
        model = contender.load(folder / "model")
    loaded = settled_memory()
    with peak() as saving:
        contender.save(model, _made(folder / "again"))
    facts = {
        "share": share_of(model),
        "load": loading[0] - before,
        "load_s": loading[1],
        "save": saving[0] - loaded,
        "save_s": saving[1],
    }
    print(json.dumps(facts), flush=True)


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


# -- all of them --------------------------------------------------------------------------------------------------


def measure(name: str, folder: Path) -> list[dict[str, float]]:
    """The facts of each rank."""
    sizes = TOPOLOGIES.get(name, {})
    count = 1
    for size in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
        count *= sizes.get(size, 1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--rank-of", name, "--folder", str(folder)]
    ranks = [
        subprocess.Popen(
            command,
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    facts = []
    for rank in ranks:
        out, errors = rank.communicate()
        if rank.returncode != 0:
            raise SystemExit(f"{name}: a rank failed\n{errors}")
        facts.append(json.loads(out.splitlines()[-1]))
    return facts


def largest_tensor() -> int:
    """Bytes of the embedding in float32."""
    return SHAPE["vocab_size"] * SHAPE["hidden_size"] * 4


def row(name: str, facts: list[dict[str, float]]) -> tuple[str, bool]:
    """A line of the table, of the rank that needs most, and whether the bars hold."""
    shares = max(rank["load"] / rank["share"] for rank in facts)
    tensors = max(rank["save"] for rank in facts) / largest_tensor()
    cells = [
        name,
        f"{max(rank['share'] for rank in facts) / MIB:.0f}",
        f"{max(rank['load'] for rank in facts) / MIB:.0f}",
        f"{shares:.2f}",
        f"{max(rank['load_s'] for rank in facts):.1f}",
        f"{max(rank['save'] for rank in facts) / MIB:.0f}",
        f"{tensors:.2f}",
        f"{max(rank['save_s'] for rank in facts):.1f}",
    ]
    return f"| {' | '.join(cells)} |", name == REFERENCE or (shares <= MAX_SHARES and tensors <= MAX_TENSORS)


def main() -> None:
    """Measure and print; the exit status says whether the bars hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="also write the table to this file")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        be_rank(args.rank_of, args.folder)
        return
    lines, held = [], True
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name, shape in (("model", SHAPE), ("tiny", TINY)):
            write_checkpoint(folder / name, shape)
        size = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors"))
        for name in (REFERENCE, *TOPOLOGIES):
            line, within = row(name, measure(name, folder))
            lines.append(line)
            held = held and within
    text = "\n".join(
        [
            f"{size / 1e6:.0f} MB of bfloat16 in the file, loaded in float32, exported in bfloat16; of each topology "
            f"the rank that needs most. MiB of own memory; the largest tensor has {largest_tensor() / MIB:.0f} MiB.",
            "",
            "| | share | peak of loading | in shares | s | peak of saving | in tensors | s |",
            "|---|--:|--:|--:|--:|--:|--:|--:|",
            *lines,
            "",
            f"Bars: {MAX_SHARES} shares and {MAX_TENSORS:.0f} tensors: {'held' if held else 'MISSED'}.",
            "",
        ]
    )
    print(text)
    if args.write:
        args.write.parent.mkdir(parents=True, exist_ok=True)
        args.write.write_text(text)
    raise SystemExit(0 if held else 1)


if __name__ == "__main__":
    main()
