"""Servers in a thread of the test's own process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from collie_core.api import serve
from collie_server.server import HttpServer


class Running(NamedTuple):
    url: str
    stop: threading.Event
    thread: threading.Thread


@contextmanager
def serving(
    model: Any, tokenizer: Any, *, slots: int = 32, queue: int = 128, compare: Any = None, **options: Any
) -> Iterator[Running]:
    places: list[str] = []
    ready, stop = threading.Event(), threading.Event()

    def work() -> None:
        def announce(where: str) -> None:
            places.append(where)
            ready.set()

        sizes = {"slots": slots, "queue": queue}
        serve(HttpServer(port=0, **options), model, tokenizer, compare=compare, ready=announce, stop=stop, **sizes)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert ready.wait(20)
    try:
        yield Running(places[0], stop, thread)
    finally:
        stop.set()
        thread.join(10)
        assert not thread.is_alive()
