"""Tokens per second of `generate` against transformers' own, and what a new token costs when two stages share a model.

A llama of 15 million random parameters, float32, greedy. In one process both generate 64 tokens after 8 prompts of
different lengths, a call each in turn, so that a machine whose speed drifts slows both alike; the ratio is the median
over rounds. Then prompts of 64 to 448 tokens take turns, on two pipeline stages and in one process with transformers
alone: the median time from one new token to the next; `--write` draws it too, into a .svg beside the page. With the
keys and values of earlier tokens kept where their layers are, only attention grows with the context, there as here.

    python benchmarks/generation.py [--rounds 12] [--write benchmarks/results/generation.md]

Exit code 1 when generating here is more than 2 % slower than there, or when the time per token grows by more with two
stages than in one process, beyond noise.
"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # read by imports

import argparse
import logging
import multiprocessing
import socket
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import matplotlib
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from collie_core.api import RunConfig, Trainer
from collie_core.data.tokenizer import byte_tokenizer
from collie_core.generate import generate

SHAPE: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 512,
}
PROMPTS, NEW, CONTEXTS, WARM_UP, NOISE = 8, 64, (64, 128, 192, 256, 320, 384, 448), 2, 1.1
SLOWEST = 0.98  # of transformers' speed
STAGES, ALONE = "CoLLiE, two pipeline stages", "transformers, one process"


class Times:
    """A streamer that keeps the time of each new token."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, ids: torch.Tensor) -> None:
        self.at.append(time.perf_counter())

    def end(self) -> None:
        """The last token has been given."""

    def per_token(self) -> list[float]:
        """Seconds from one new token to the next; the prompt and the first of them are left out."""
        return [after - before for before, after in zip(self.at[1:], self.at[2:], strict=False)]


def new_model() -> LlamaForCausalLM:
    """Always the same weights."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, eos_token_id=None)).eval()


def prompts(count: int, longest: int) -> list[list[int]]:
    """Random bytes, each prompt a little shorter than the one before."""
    ids = torch.randint(0, 256, (count, longest), generator=torch.Generator().manual_seed(1)).tolist()
    return [row[: longest - number] for number, row in enumerate(ids)]


@torch.no_grad()
def by_transformers(model: LlamaForCausalLM, given: list[list[int]], new: int, streamer: Any = None) -> list[list[int]]:
    """As its documentation does it: padded on the left, with a mask."""
    width = max(map(len, given))
    ids = torch.tensor([[257] * (width - len(row)) + row for row in given])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in given])
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 257, "streamer": streamer}
    output: Any = model.generate(ids, attention_mask=mask, max_new_tokens=new, **options)  # type: ignore[operator]
    return [row[width:].tolist() for row in output]


def compare(rounds: int) -> tuple[float, float, float]:
    """Seconds of a call there and here, and the median ratio of speeds."""
    model, tokenizer, given = new_model(), byte_tokenizer(), prompts(PROMPTS, 64)
    tokenizer.eos_token = None  # no answer ends early
    theirs, ours = [], []
    for number in range(WARM_UP + rounds):
        began = time.perf_counter()
        expected = by_transformers(model, given, NEW)
        between = time.perf_counter()
        found = generate(model, tokenizer, given, max_new_tokens=NEW)
        ended = time.perf_counter()
        assert found == expected
        if number >= WARM_UP:
            theirs.append(between - began)
            ours.append(ended - between)
    ratios = [there / here for there, here in zip(theirs, ours, strict=True)]
    return statistics.median(theirs), statistics.median(ours), statistics.median(ratios)


def per_token(rounds: int, call: Any) -> list[float]:
    """The median seconds per token after each of the contexts; `call(prompts, new, streamer)` generates."""
    seconds: dict[int, list[float]] = {context: [] for context in CONTEXTS}
    for number in range(WARM_UP + rounds):
        for context in CONTEXTS:
            times = Times()
            call(prompts(1, context), 32, times)
            if number >= WARM_UP:
                seconds[context] += times.per_token()
    return [statistics.median(seconds[context]) for context in CONTEXTS]


def alone(rounds: int) -> list[float]:
    """In one process, by transformers."""
    model = new_model()
    return per_token(rounds, lambda given, new, streamer: by_transformers(model, given, new, streamer))


def stage(rank: int, port: int, rounds: int, answers: Connection) -> None:
    """One of two pipeline stages; the first reports."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig(
            model={"config": {"model_type": "llama", **SHAPE}},
            tokenizer={"type": "byte"},
            parallel={"pipeline_parallel_size": 2},
            train={"output_dir": folder},
        )
        trainer = Trainer(config, observers=())
        model: Any = trainer.model
        tokenizer = byte_tokenizer()
        tokenizer.eos_token, model.generation_config.eos_token_id = None, None

        def call(given: list[list[int]], new: int, streamer: Any) -> None:
            with trainer.parts.precision():
                generate(model, tokenizer, given, max_new_tokens=new, streamer=streamer)

        found = per_token(rounds, call)
        trainer.topology.barrier()
    if rank == 0:
        answers.send(found)


def two_stages(rounds: int) -> list[float]:
    """On two processes, forked from this one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    ranks = [context.Process(target=stage, args=(rank, port, rounds, there)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        raise SystemExit("a stage has failed")
    found: list[float] = here.recv()
    return found


def page(compared: tuple[float, float, float], stages: list[float], one: list[float]) -> str:
    """What benchmarks/results/generation.md says."""
    theirs, ours, ratio = compared
    tokens = PROMPTS * NEW
    short, long = CONTEXTS[0], CONTEXTS[-1]
    lines = [
        "# Generation",
        "",
        f"{time.strftime('%Y-%m-%d')}; {os.cpu_count()} cores, one thread per process, "
        f"Python {sys.version_info.major}.{sys.version_info.minor}, torch {torch.__version__}, "
        f"transformers {version('transformers')}; a llama of 15 million parameters, float32, greedy.",
        "",
        f"{PROMPTS} prompts of 57 to 64 tokens, {NEW} new tokens each, one process:",
        "",
        "| | ms per call | tokens/s | ratio of speeds |",
        "|---|--:|--:|--:|",
        f"| transformers' generate | {theirs * 1e3:.0f} | {tokens / theirs:.0f} | |",
        f"| CoLLiE | {ours * 1e3:.0f} | {tokens / ours:.0f} | {ratio:.3f} |",
        "",
        "One prompt, milliseconds from one new token to the next:",
        "",
        f"| | {short} tokens before | {long} tokens before | ratio |",
        "|---|--:|--:|--:|",
    ]
    for name, (first, *_, last) in ((STAGES, stages), (ALONE, one)):
        lines.append(f"| {name} | {first * 1e3:.2f} | {last * 1e3:.2f} | {last / first:.2f} |")
    return "\n".join([*lines, ""])


def draw(file: Path, stages: list[float], one: list[float]) -> None:
    """Milliseconds per new token over the tokens before it."""
    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    for name, seconds in ((STAGES, stages), (ALONE, one)):
        axes.plot(CONTEXTS, [1e3 * value for value in seconds], marker="o", label=name)
    axes.set(xlabel="tokens before", ylabel="ms per new token", ylim=(0, None))
    axes.legend()
    figure.savefig(file, metadata={"Date": None})


def main() -> int:
    """Measure, print, and write the page if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    stages = two_stages(args.rounds)  # before threads are started here: it forks
    compared, one = compare(args.rounds), alone(args.rounds)
    text = page(compared, stages, one)
    print(text)
    if args.write:
        args.write.write_text(text, encoding="utf-8")
        draw(args.write.with_suffix(".svg"), stages, one)
    grows = stages[-1] / stages[0] > NOISE * max(1.0, one[-1] / one[0])
    return int(compared[2] < SLOWEST or grows)


if __name__ == "__main__":
    sys.exit(main())
