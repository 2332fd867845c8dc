"""`HttpServer`, what `type: http` builds: the engine, the application and uvicorn, from start to clean stop."""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import uvicorn

from collie_core.api import RunError, end_ids
from collie_server.app import Service, make_app
from collie_server.engine import Engine
from collie_server.guard import is_local
from collie_server.metrics import Metrics
from collie_server.prompts import Limits, Prompts

logger = logging.getLogger("collie.server")

GRACE_SECONDS = 2  # for connections, when the server stops; the engine has had as long before


class HttpServer:
    """A `collie_core.api.Server` over HTTP. The arguments are the fields of `HttpConfig`.

    Attributes:
        token: what clients must know; None: nothing.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 8000,
        token: str | None = None,
        model_name: str = "model",
        max_batch_size: int = 32,
        max_queue: int = 128,
        max_prompt_tokens: int | None = None,
        max_new_tokens: int = 2048,
        max_body_bytes: int = 1_000_000,
        timeout: float = 300.0,
    ) -> None:
        self.token = token if token is not None or is_local(host) else secrets.token_urlsafe(24)
        self._address = (host, port)
        self._model_name = model_name
        self._slots, self._queue = max_batch_size, max_queue
        self._most_prompt, self._most_new = max_prompt_tokens, max_new_tokens
        self._max_body_bytes = max_body_bytes
        self._timeout = timeout
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Let `serve` return within a few seconds; from any thread or signal handler, also before it has begun."""
        self._stopped.set()

    def serve(self, model: Any, tokenizer: Any, config: Any, ready: Callable[[int], None]) -> None:
        """Answer requests until `stop`; `ready(port)` is called once they are accepted.

        Signals stay as they are: an interrupt raises KeyboardInterrupt here, and the server stops as cleanly.

        Args:
            model: a causal language model of transformers.
            tokenizer: of the model.
            config: not needed.
            ready: gets the port.

        Raises:
            RunError: the address cannot be listened on, or uvicorn ends by itself.
            ModelError: the model cannot be batched.
        """
        engine = Engine(model, tokenizer, ends=end_ids(model, tokenizer), slots=self._slots, queue=self._queue)
        listener = self._listen()
        app = make_app(self._service(engine, model, tokenizer), token=self.token, max_body_bytes=self._max_body_bytes)
        server = _uvicorn(app)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), name="collie-http", daemon=True)
        engine.start()
        thread.start()
        try:
            while not server.started and thread.is_alive():
                time.sleep(0.005)
            if server.started:
                ready(listener.getsockname()[1])
            while thread.is_alive() and not self._stopped.wait(1.0):
                pass
            if not self._stopped.is_set():
                raise RunError("the HTTP server ended by itself; the log of uvicorn says why")
        finally:
            engine.close()  # first: running answers end, so that their connections can
            server.should_exit = True
            thread.join(GRACE_SECONDS + 1)
            listener.close()

    def _service(self, engine: Engine, model: Any, tokenizer: Any) -> Service:
        return Service(
            engine,
            Prompts(tokenizer, self._limits(model)),
            Metrics(engine),
            self._model_name,
            int(time.time()),
            self._timeout,
        )

    def _limits(self, model: Any) -> Limits:
        config = model.config.get_text_config()
        virtual = getattr(getattr(model, "collie_virtual_tokens", None), "positions", 0)
        context = (getattr(config, "max_position_embeddings", None) or 2**31) - virtual
        return Limits(context, self._most_prompt or context, self._most_new, config.vocab_size)

    def _listen(self) -> socket.socket:
        host, port = self._address
        listener = None
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            listener = socket.socket(family, kind, protocol)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(1024)
        except OSError as error:
            if listener is not None:
                listener.close()
            raise RunError(f"cannot listen on {host}:{port}: {error}; choose another --port, or 0 for any") from error
        return listener


def _uvicorn(app: Any) -> uvicorn.Server:
    options: dict[str, Any] = {"interface": "asgi3", "http": "h11", "ws": "none", "lifespan": "off", "loop": "asyncio"}
    options |= {"log_config": None, "access_log": False, "server_header": False, "proxy_headers": False}
    return uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=GRACE_SECONDS, **options))
