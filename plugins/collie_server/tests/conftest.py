"""A small random model, and servers of it on free ports."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import pytest

from collie_server.server import HttpServer

sys.path.append(str(Path(__file__).parent / "support"))  # --import-mode=importlib adds no folder by itself

from small_models import letters, tiny


class Model(NamedTuple):
    model: Any
    tokenizer: Any


class Running(NamedTuple):
    url: str
    server: HttpServer
    thread: threading.Thread


@pytest.fixture(scope="session")
def small() -> Model:
    tokenizer = letters()
    return Model(tiny(tokenizer), tokenizer)


@pytest.fixture(scope="session")
def folder(small: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small")
    small.model.save_pretrained(path)
    small.tokenizer.save_pretrained(path)
    return path


@contextmanager
def serving(model: Any, tokenizer: Any, **options: Any) -> Iterator[Running]:
    server = HttpServer(port=0, **options)
    ports: list[int] = []
    ready = threading.Event()

    def announce(port: int) -> None:
        ports.append(port)
        ready.set()

    thread = threading.Thread(target=server.serve, args=(model, tokenizer, None, announce), daemon=True)
    thread.start()
    assert ready.wait(20)
    try:
        yield Running(f"http://127.0.0.1:{ports[0]}", server, thread)
    finally:
        server.stop()
        thread.join(10)
        assert not thread.is_alive()


Serve = Callable[..., Running]


@pytest.fixture
def serve(small: Model) -> Iterator[Serve]:
    """Start a server with options of its own."""
    from contextlib import ExitStack

    with ExitStack() as stack:

        def start(model: Any = small.model, tokenizer: Any = small.tokenizer, **options: Any) -> Running:
            return stack.enter_context(serving(model, tokenizer, **options))

        yield start


@pytest.fixture(scope="session")
def running(small: Model) -> Iterator[Running]:
    """A server for every test that needs no other."""
    with serving(small.model, small.tokenizer, model_name="small") as one:
        yield one


@pytest.fixture
def client(running: Running) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=running.url, timeout=60, trust_env=False) as one:
        yield one
