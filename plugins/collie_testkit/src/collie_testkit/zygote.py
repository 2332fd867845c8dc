"""Run a function of a test file on several gloo ranks, without paying for the imports each time.

A child process imports what a run needs once; for every request it forks one process per rank. A rank that does not
finish in time prints the stack of each of its threads and ends; the others are then killed.

    with Zygote() as zygote:
        results = zygote.run(__file__, "train_two_steps", world_size=2, args=(path,))
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import importlib.util
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

GRACE_S = 5.0  # for the other ranks to fail by themselves once one has


class RanksFailed(AssertionError):
    """At least one rank did not finish; the message holds what every rank printed."""


class Zygote:
    """The parent's handle on the process that forks."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # what the test files import beside them
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )

    def __enter__(self) -> Zygote:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def run(
        self, file: str, function: str, *, world_size: int, args: tuple[Any, ...] = (), limit_s: float = 120.0
    ) -> list[Any]:
        """What `function(*args)` of the test `file` returned on each rank.

        Raises:
            RanksFailed: a rank raised, died or ran past `limit_s` seconds.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        pickle.dump((file, function, world_size, args, limit_s), self.process.stdin)
        self.process.stdin.flush()
        results, logs = pickle.load(self.process.stdout)  # noqa: S301  (our own child)
        if any(code != 0 for code, _ in results):
            said = "\n".join(
                f"--- rank {rank} (exit {code})\n{log}"
                for rank, ((code, _), log) in enumerate(zip(results, logs, strict=True))
            )
            raise RanksFailed(f"{function} on {world_size} ranks:\n{said}")
        return [value for _, value in results]


def _serve() -> None:
    """Fork ranks for each request on standard input until it closes."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing a library prints may get between the answers
    _import_everything()
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)  # noqa: S301  (our own parent)
        except EOFError:
            return
        with tempfile.TemporaryDirectory() as folder:
            pickle.dump(_run_ranks(Path(folder), *request), answers)
            answers.flush()


def _import_everything() -> None:
    """What each rank would import else, and what transformers finds out when it first writes a model."""
    import datasets  # noqa: F401
    import torch
    import transformers.optimization  # noqa: F401  (by the engines)
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    from collie_core.api import RunConfig, Trainer  # noqa: F401

    for name in ("deepspeed", "deepspeed.module_inject.auto_ep_layer", "peft"):
        if importlib.util.find_spec(name.partition(".")[0]) is not None:
            importlib.import_module(name)
    RunConfig(model={"config": {"model_type": "llama"}}, tokenizer="byte")  # with what the defaults describe
    torch.set_num_threads(1)
    tiny = LlamaConfig(hidden_size=8, intermediate_size=8, num_attention_heads=1, num_hidden_layers=1, vocab_size=8)
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(tiny).save_pretrained(folder)
    logging.enable_progress_bar()
    gc.collect()
    gc.freeze()  # what is here stays: ranks need neither look through it nor, for that, copy its pages


def _run_ranks(
    folder: Path, file: str, function: str, world_size: int, args: tuple[Any, ...], limit_s: float
) -> tuple[list[tuple[int, Any]], list[str]]:
    port = _free_port()
    pids = []
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            _be_rank(folder, file, function, rank, world_size, port, args, limit_s)
        pids.append(pid)
    codes = _wait(pids, limit_s + 2 * GRACE_S)
    results = []
    for rank, code in enumerate(codes):
        answer = folder / f"{rank}.pickle"
        results.append((code, pickle.loads(answer.read_bytes()) if code == 0 else None))  # noqa: S301
    return results, [(folder / f"{rank}.log").read_text(errors="replace")[-8000:] for rank in range(world_size)]


def _free_port() -> int:
    """Below the ports that outgoing connections take, and another for each test process of this machine."""
    for attempt in range(100):
        port = 10000 + (os.getpid() * 97 + time.time_ns() // 1000 + attempt) % 20000
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise OSError("no free port between 10000 and 30000")


def _be_rank(
    folder: Path, file: str, function: str, rank: int, world_size: int, port: int, args: tuple[Any, ...], limit_s: float
) -> None:
    log = os.open(folder / f"{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable()
    faulthandler.dump_traceback_later(limit_s, exit=True)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    code = 1
    try:
        spec = importlib.util.spec_from_file_location("ranks_test_file", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        value = getattr(module, function)(*args)
        (folder / f"{rank}.pickle").write_bytes(pickle.dumps(value))
        code = 0
    except BaseException:  # noqa: BLE001  (the process ends here; the parent gets the trace)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # no exit handlers: they belong to the zygote


def _wait(pids: list[int], limit_s: float) -> list[int]:
    codes: dict[int, int] = {}
    deadline = time.monotonic() + limit_s
    while len(codes) < len(pids):
        for pid in set(pids) - set(codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
                if codes[pid] != 0:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        if time.monotonic() > deadline:
            for pid in set(pids) - set(codes):
                os.kill(pid, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


if __name__ == "__main__":
    _serve()
