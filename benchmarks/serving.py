"""Tokens per second that clients get from `collie serve` and from `transformers serve`, and what an idle server costs.

A llama of 15 million random parameters, float32, greedy, on the CPU with one thread. The servers run side by side and
take turns: while one is asked, the others wait. 1, 8 and 32 clients stream an answer of 64 tokens each to prompts of
different lengths; rate and time to the first token are medians over rounds. transformers is asked with its continuous
batching and without. Then a small model trains with a server that nobody asks and without one, in turns; as other
programs may run on the machine, processor time is compared, that of the server's thread included.

    python benchmarks/serving.py [--rounds 5] [--write benchmarks/results/serving.md]

Exit code 1 when `collie serve` is slower than the faster of the two at 1 or 8 clients, when 32 clients together get
less than three times what one gets, or when an idle server costs more than 1 % of a step.
"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}  # read by imports

import argparse
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import Request, urlopen

import torch
from generation import SHAPE
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from collie_core.api import Run, RunConfig, Trainer

CLIENTS, NEW = (1, 8, 32), 64
OURS, THEIRS, BATCHED = "collie serve", "transformers serve", "transformers serve --continuous-batching"
LEAST, GAIN, COST = 1.0, 3.0, 0.01
STEPS = 60


class Rate(NamedTuple):
    """What clients got."""

    tokens_per_second: float
    first_token: float  # seconds, the median over the clients


def save_model(folder: Path) -> None:
    """Always the same weights; no answer ends early."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, bos_token_id=None, eos_token_id=None))
    model.generation_config = GenerationConfig(do_sample=False)
    model.save_pretrained(folder)
    words = {f"w{number}": number for number in range(SHAPE["vocab_size"])}  # whatever is drawn is text at once
    core = Tokenizer(models.WordLevel(words, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False).save_pretrained(folder)


def free_port() -> int:
    """Of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def started(command: list[str], port: int) -> Iterator[str]:
    """The URL of a server, once it answers."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            while process.poll() is None:
                try:
                    with urlopen(f"{url}/health", timeout=5):
                        break
                except OSError:
                    time.sleep(0.1)
            else:
                raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
            yield url
        finally:
            process.terminate()


def ask(url: str, folder: Path, number: int) -> float:
    """Take one streamed answer; returns the seconds to its first token."""
    prompt = " ".join(f"w{place * (number + 3) % 4096}" for place in range(40 + number % 25))
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": NEW, "temperature": 0, "stream": True}
    body["model"] = str(folder)
    request = Request(f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    began, first, last = time.perf_counter(), 0.0, ""
    with urlopen(request, timeout=600) as response:
        for line in response:
            text = line.decode().strip()
            if text.startswith("data: {"):
                first, last = first or time.perf_counter() - began, text
    (choice,) = json.loads(last.removeprefix("data: "))["choices"]
    assert choice["finish_reason"] == "length", last
    return first


def measure(url: str, folder: Path, clients: int) -> Rate:
    """So many clients at once, an answer each."""
    with ThreadPoolExecutor(clients) as pool:
        began = time.perf_counter()
        first = list(pool.map(lambda number: ask(url, folder, number), range(clients)))
        seconds = time.perf_counter() - began
    return Rate(clients * NEW / seconds, statistics.median(first))


def serving(rounds: int) -> dict[str, dict[int, Rate]]:
    """The medians by server and number of clients."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        save_model(folder)
        beside = Path(sys.executable).parent
        commands = {
            OURS: [str(beside / "collie"), "serve", name, "--model-name", name],
            THEIRS: [str(beside / "transformers"), "serve", name, "--device", "cpu"],
            BATCHED: [
                str(beside / "transformers"),
                "serve",
                name,
                "--device",
                "cpu",
                "--continuous-batching",
                "--cb-max-memory-percent",
                "0.05",
            ],
        }
        urls = {}
        for server, command in commands.items():
            port = free_port()
            urls[server] = stack.enter_context(started([*command, "--port", str(port)], port))
        found: dict[str, dict[int, list[Rate]]] = {server: {count: [] for count in CLIENTS} for server in commands}
        for number in range(-1, rounds):  # the first is for warming up
            for count in CLIENTS:
                for server, url in urls.items():
                    rate = measure(url, folder, count)
                    if number >= 0:
                        found[server][count].append(rate)
        return {server: {count: _median(rates) for count, rates in by.items()} for server, by in found.items()}


def _median(rates: list[Rate]) -> Rate:
    return Rate(*(statistics.median(values) for values in zip(*rates, strict=True)))


class Steps:
    """The processor time of every step of a run, of all threads."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def collie_before_step(self) -> None:
        now = time.process_time()
        if self.seconds:
            self.seconds[-1] = now - self.seconds[-1]
        self.seconds.append(now)

    def collie_run_end(self, run: Run) -> None:
        self.seconds = self.seconds[5:-1]  # without the warming up, and the last, which has no end


def idle(rounds: int) -> tuple[float, float]:
    """Milliseconds of processor time per step without a server, and with one that nobody asks."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    rows = [{"input": "Count: ", "output": "1 2 3 4 5 6 7 8 9 " * (1 + number % 5)} for number in range(64)]
    for number in range(2 * rounds):
        served = bool((number + number // 2) % 2)
        with tempfile.TemporaryDirectory() as folder:
            config = RunConfig(
                model={"config": {"model_type": "llama", **SHAPE, "num_hidden_layers": 1}},
                tokenizer="byte",
                data={"max_length": 128, "cache_dir": f"{folder}/cache"},
                train={"max_steps": STEPS, "per_device_train_batch_size": 8, "output_dir": f"{folder}/run"},
                server={"type": "http", "port": 0} if served else None,
            )
            steps = Steps()
            Trainer(config, train_dataset=rows, callbacks=[steps], observers=()).train()
        seconds[served] += steps.seconds
    return 1e3 * statistics.median(seconds[False]), 1e3 * statistics.median(seconds[True])


def page(rates: dict[str, dict[int, Rate]], quiet: float, served: float) -> str:
    """What benchmarks/results/serving.md says."""
    lines = [
        "# Serving",
        "",
        f"{time.strftime('%Y-%m-%d')}; {os.cpu_count()} cores, one thread per process, "
        f"Python {sys.version_info.major}.{sys.version_info.minor}, torch {torch.__version__}, "
        f"transformers {version('transformers')}; a llama of 15 million parameters, float32, greedy.",
        "",
        f"Prompts of 40 to 64 tokens, {NEW} new ones to each client; tokens/s of all clients together, and in brackets "
        "milliseconds to the first token:",
        "",
        f"| | {' | '.join(f'{count} client' + 's' * (count > 1) for count in CLIENTS)} |",
        "|---|--:|--:|--:|",
    ]
    for server, by in rates.items():
        cells = (f"{rate.tokens_per_second:.0f} ({1e3 * rate.first_token:.0f})" for rate in by.values())
        lines.append(f"| {server} | {' | '.join(cells)} |")
    lines += [
        "",
        f"A step of a small model takes {quiet:.2f} ms of processor time without a server, and {served:.2f} ms with "
        f"one that nobody asks: {100 * (served / quiet - 1):+.1f} %.",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    """Measure, print, and write the page if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rates = serving(args.rounds)
    quiet, served = idle(args.rounds)
    text = page(rates, quiet, served)
    print(text)
    if args.write:
        args.write.write_text(text, encoding="utf-8")
    speed = {server: {count: rate.tokens_per_second for count, rate in by.items()} for server, by in rates.items()}
    slower = any(speed[OURS][count] < LEAST * max(speed[THEIRS][count], speed[BATCHED][count]) for count in (1, 8))
    return int(slower or speed[OURS][32] < GAIN * speed[OURS][1] or served > (1 + COST) * quiet)


if __name__ == "__main__":
    sys.exit(main())
