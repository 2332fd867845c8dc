"""Checks of servers: one of them answers with a small model, in this process or on several ranks, and clients ask it.

How a client asks is `Material.ask`; without it, as the interface of OpenAI has it: POST /v1/completions.
"""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from collie_core.api import ParallelConfig, Topology, load_for_generation, serve
from collie_testkit.context import Context, Material
from collie_testkit.registry import Skipped, check, expect
from collie_testkit.training import sizes_of
from collie_testkit.zygote import Zygote

PATH = "/v1/completions"
LETTERS = "abcdefghijklmnopqrstuvwxyz ,.!0123456789"
CONTEXT = 128  # tokens
TOKENS = 12
PROMPTS = ("a", "hello, ", "12 and 13 are ")
SPLITS = ("tp2", "pp2")
WAIT_S = 20.0
MOST_STOP_S = 5.0
START_S = 60.0  # of ranks, on a busy machine


class Small(NamedTuple):
    """A model whose answers are texts of single letters, and its tokenizer."""

    model: Any
    tokenizer: Any


def small_model() -> Small:
    """The same each time."""
    vocabulary = {letter: number for number, letter in enumerate(("<pad>", "<eos>", *LETTERS))}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokens.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokens.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<eos>", pad_token="<pad>")
    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=CONTEXT, eos_token_id=1, pad_token_id=0, bos_token_id=1, initializer_range=0.3,
    )  # fmt: skip
    return Small(LlamaForCausalLM(config).eval(), tokenizer)


def greedy(small: Small, prompt: str) -> str:
    """What transformers writes after a prompt."""
    return str(small.tokenizer.decode(greedy_ids(small, prompt), skip_special_tokens=True))


def greedy_ids(small: Small, prompt: str) -> list[int]:
    """The same as ids: `TOKENS` of them, or up to the end of the text, which is one of them."""
    ids = torch.tensor([small.tokenizer(prompt)["input_ids"]])
    with torch.no_grad():
        found = small.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False, pad_token_id=0
        )
    return [int(token) for token in found[0, ids.shape[1] :]]


# -- a running server -----------------------------------------------------------------------------------------------


class Running(NamedTuple):
    """Where a server is, and the thread in which its model answers."""

    where: str
    stop: threading.Event
    thread: threading.Thread


@contextmanager
def running(context: Context, small: Small) -> Iterator[Running]:
    """The server on a free port, until the block ends."""
    places: list[str] = []
    ready, stop = threading.Event(), threading.Event()

    def announce(where: str) -> None:
        places.append(where)
        ready.set()

    server = _on_a_free_port(context).build()
    thread = threading.Thread(
        target=serve, args=(server, *small), kwargs={"ready": announce, "stop": stop}, daemon=True
    )
    thread.start()
    expect(ready.wait(WAIT_S), f"ready() was not called within {WAIT_S:g} s")
    try:
        yield Running(places[0], stop, thread)
    finally:
        stop.set()
        thread.join(WAIT_S)


def _on_a_free_port(context: Context) -> Context:
    if "port" not in context.plugins.config_model("server", context.name).model_fields:
        return context
    options = {"port": 0, **context.material.options}
    return replace(context, material=replace(context.material, options=options))


def asker(context: Context) -> Callable[[str, str], str]:
    """(where, prompt) -> the greedy answer of `TOKENS` tokens."""
    return context.material.ask or ask_over_http


def ask_over_http(where: str, prompt: str) -> str:
    """By the interface of OpenAI."""
    return str(complete(where, prompt)["choices"][0]["text"])


def complete(where: str, prompt: str) -> dict[str, Any]:
    """All that comes back."""
    status, answer = post(where, json.dumps({"prompt": prompt, "max_tokens": TOKENS, "temperature": 0}).encode())
    expect(status == 200, f"POST {PATH} gives {status}: {answer}")
    found: dict[str, Any] = answer
    return found


def post(where: str, body: bytes) -> tuple[int, Any]:
    """Status and JSON body of a request."""
    request = urllib.request.Request(where + PATH, body, {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=WAIT_S) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read() or b"null")


def _require_http(context: Context, where: str) -> None:
    if context.material.ask is not None or not where.startswith("http"):
        raise Skipped("it is asked in its own way (checks(..., ask=...)), and this check speaks HTTP")


# -- level 1 --------------------------------------------------------------------------------------------------------


@check("server", level=1, mutant="tidies-up")
def answers(context: Context) -> None:
    """Greedy answers are what transformers writes, to the last letter."""
    small, ask = small_model(), asker(context)
    with running(context, small) as server:
        for prompt in PROMPTS:
            found, wanted = ask(server.where, prompt), greedy(small, prompt)
            expect(found == wanted, f"after {prompt!r} it writes {found!r} instead of {wanted!r}")


@check("server", level=1, mutant="terse")
def interface(context: Context) -> None:
    """An answer says of what kind it is, the number of each choice and why it ended, as OpenAI's interface has it."""
    small = small_model()
    with running(context, small) as server:
        _require_http(context, server.where)
        for prompt in PROMPTS:
            answer = complete(server.where, prompt)
            expect(answer.get("object") == "text_completion", f"object is {answer.get('object')!r}")
            (choice,) = answer["choices"]
            expect(choice.get("index") == 0, f"the only choice has the index {choice.get('index')!r}")
            reason = "stop" if small.tokenizer.eos_token_id in greedy_ids(small, prompt) else "length"
            found = choice.get("finish_reason")
            expect(found == reason, f"the answer to {prompt!r} has the finish_reason {found!r} instead of {reason!r}")


@check("server", level=1, mutant="crashes-on-rubbish")
def rubbish(context: Context) -> None:
    """A request that cannot be understood gets a 4xx with the reason as JSON, and the next one an answer."""
    small = small_model()
    with running(context, small) as server:
        _require_http(context, server.where)
        for body in (b"", b"{", b'"a"', b"[]", b"{}", b'{"prompt": 5, "max_tokens": "many"}'):
            status, answer = post(server.where, body)
            expect(400 <= status < 500, f"the body {body!r} gives {status}, not 4xx")
            expect(isinstance(answer, dict) and answer.get("error"), f"the body {body!r} gives no error: {answer}")
        expect(ask_over_http(server.where, "a") == greedy(small, "a"), "after rubbish the answers are others")


@check("server", level=1, mutant="endless")
def limits(context: Context) -> None:
    """A prompt longer than the context gets a 4xx, and the next one an answer."""
    small = small_model()
    with running(context, small) as server:
        _require_http(context, server.where)
        status, answer = post(server.where, json.dumps({"prompt": "a" * 2 * CONTEXT, "max_tokens": 2}).encode())
        expect(400 <= status < 500, f"a prompt of {2 * CONTEXT} tokens gives {status}: {answer}")
        expect(ask_over_http(server.where, "a") == greedy(small, "a"), "after a long prompt the answers are others")


@check("server", level=1, mutant="mixes-up")
def concurrency(context: Context) -> None:
    """Clients that ask at the same time each get their own answer."""
    small, ask = small_model(), asker(context)
    prompts = [f"client {number} says " for number in range(8)]
    wanted = [greedy(small, prompt) for prompt in prompts]
    with running(context, small) as server, ThreadPoolExecutor(len(prompts)) as pool:
        found = list(pool.map(lambda prompt: ask(server.where, prompt), prompts))
    wrong = [number for number, text in enumerate(found) if text != wanted[number]]
    expect(not wrong, f"{len(wrong)} of {len(prompts)} clients got another answer than alone")


@check("server", level=1, mutant="easily-offended")
def disconnects(context: Context) -> None:
    """Clients that go away in the midst of a request or an answer do no harm."""
    small = small_model()
    with running(context, small) as server:
        _require_http(context, server.where)
        address = urlsplit(server.where)
        body = json.dumps({"prompt": "a", "max_tokens": 100}).encode()
        head = f"POST {PATH} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
        whole = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        for sent in (whole[:20], whole[:-5], whole):
            with socket.create_connection((address.hostname or "", address.port or 80), timeout=WAIT_S) as client:
                client.sendall(sent)
        expect(ask_over_http(server.where, "a") == greedy(small, "a"), "after clients that left the answers are others")


@check("server", level=1, mutant="stays")
def stop(context: Context) -> None:
    """`stop` ends `serve` within 5 seconds, and frees the port."""
    small, ask = small_model(), asker(context)
    before = set(threading.enumerate())
    with running(context, small) as server:
        ask(server.where, "a")
        begin = time.monotonic()
        server.stop.set()
        server.thread.join(WAIT_S)
        took = time.monotonic() - begin
    left = {thread.name for thread in threading.enumerate() if thread not in before}
    expect(took < MOST_STOP_S and "collie-server" not in left, f"it has not ended {took:.1f} s after stop()")
    if server.where.startswith("http"):
        address = urlsplit(server.where)
        with socket.socket() as free:
            code = free.connect_ex((address.hostname or "", address.port or 80))
        expect(code != 0, "its port still takes connections")


# -- level 2 --------------------------------------------------------------------------------------------------------


@check("server", level=2, mutant="asks-by-itself")
def ranks(context: Context) -> None:
    """On two tensor-parallel ranks and on two pipeline stages it answers as on one, and `stop` ends all of them."""
    small, ask = small_model(), asker(context)
    for part in small:
        part.save_pretrained(context.folder / "model")
    options = dict(_on_a_free_port(context).material.options)
    context.zygote()  # made here, since it may be a fixture of pytest
    with ThreadPoolExecutor(1) as pool:
        serving = pool.submit(context.on_ranks, serve_in_turn, 2, context.name, options, str(context.folder))
        try:
            found = {split: _answers_on(split, context.folder, serving, ask) for split in SPLITS}
        finally:
            for split in SPLITS:
                _stop_file(context.folder, split).touch()
    wanted = [greedy(small, prompt) for prompt in PROMPTS]
    for split, texts in found.items():
        expect(texts == wanted, f"on {split} it writes {texts} instead of {wanted}")
    for took, left in (one for rank in serving.result() for one in rank):
        expect(took < MOST_STOP_S and not left, f"{took:.1f} s after stop() a rank has ended, and left threads: {left}")


def _answers_on(split: str, folder: Path, serving: Future[Any], ask: Callable[[str, str], str]) -> list[str]:
    """Ask, once the ranks are there, and let them stop."""
    place, deadline = folder / f"{split}.place", time.monotonic() + START_S
    while not place.exists():
        if serving.done():
            serving.result()
        expect(not serving.done() and time.monotonic() < deadline, f"on {split} ready() was not called")
        time.sleep(0.02)
    found = [ask(place.read_text(), prompt) for prompt in PROMPTS]
    _stop_file(folder, split).touch()
    return found


def _stop_file(folder: Path, split: str) -> Path:
    return folder / f"{split}.stop"


class _Stop(threading.Event):
    """Set as soon as a file is there."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._file = file

    def is_set(self) -> bool:
        return self._file.exists()


def serve_in_turn(name: str, options: dict[str, Any], folder: str) -> list[tuple[float, list[str]]]:
    """On each split of the model, until somebody stops it: how long that took, and the threads that were left."""
    return [_serve_on(split, name, options, Path(folder)) for split in SPLITS]


def _serve_on(split: str, name: str, options: dict[str, Any], folder: Path) -> tuple[float, list[str]]:
    sizes, before = sizes_of(split), set(threading.enumerate())
    parallel = ParallelConfig(tensor_parallel_size=sizes["tp"], pipeline_parallel_size=sizes["pp"])
    topology = Topology.start(parallel)
    model, tokenizer = load_for_generation(str(folder / "model"), topology=topology, parallel=parallel)

    def announce(where: str) -> None:
        (folder / "unfinished").write_text(where)
        (folder / "unfinished").rename(folder / f"{split}.place")

    server = Context("server", name, folder, _no_zygote, Material(options=options)).build()
    stop = _stop_file(folder, split)
    serve(server, model, tokenizer, topology=topology, ready=announce, stop=_Stop(stop))
    left = [thread.name for thread in threading.enumerate() if thread not in before]
    return time.time() - stop.stat().st_mtime, left


def _no_zygote() -> Zygote:
    raise AssertionError("ranks have no ranks of their own")
