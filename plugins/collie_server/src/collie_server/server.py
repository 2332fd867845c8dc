"""`HttpServer`, what `type: http` builds: the application and uvicorn, from start to clean stop."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

import uvicorn

from collie_core.api import Answerer, RunError, Served
from collie_server.app import Asked, Service, make_app
from collie_server.guard import is_local
from collie_server.http_config import COMPARE
from collie_server.metrics import Metrics
from collie_server.prompts import Limits, Prompts

GRACE_SECONDS = 2  # for connections, when the server stops; answers have ended before


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
        max_prompt_tokens: int | None = None,
        max_new_tokens: int = 2048,
        max_body_bytes: int = 1_000_000,
        timeout: float = 300.0,
    ) -> None:
        known = token or os.environ.get("COLLIE_TOKEN") or None
        self.token = known if known is not None or is_local(host) else secrets.token_urlsafe(24)
        self._new_token = self.token is not None and known is None
        self._address = (host, port)
        self._model_name = model_name
        self._most_prompt, self._most_new = max_prompt_tokens, max_new_tokens
        self._max_body_bytes = max_body_bytes
        self._timeout = timeout
        self._server: uvicorn.Server | None = None
        self._stopped = False

    def stop(self) -> None:
        """Let `serve` return within a few seconds; from any thread or signal handler, also before it has begun."""
        self._stopped = True
        if self._server is not None:
            self._server.should_exit = True

    def serve(self, served: Served, ready: Callable[[str], None]) -> None:
        """Take requests until `stop`.

        Raises:
            RunError: the address cannot be listened on, or uvicorn ends by itself.
        """
        listener = self._listen()
        try:
            app = make_app(self._service(served), token=self.token, max_body_bytes=self._max_body_bytes)
            self._server = _uvicorn(app)
            self._server.should_exit = self._stopped
            asyncio.run(self._run(self._server, listener, ready))
        finally:
            listener.close()
        if not self._stopped:
            raise RunError("the HTTP server ended by itself; the log of uvicorn says why")

    async def _run(self, server: uvicorn.Server, listener: socket.socket, ready: Callable[[str], None]) -> None:
        running = asyncio.ensure_future(server.serve([listener]))
        while not server.started and not running.done():
            await asyncio.sleep(0.005)
        if server.started:
            host = self._address[0]
            if self._new_token:
                print(f"token: {self.token}", file=sys.stderr, flush=True)  # told here alone, and never written down
            ready(f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}")
        await running

    def _service(self, served: Served) -> Service:
        models = {self._model_name: self._asked(served.model)}
        if served.compare is not None:
            models[COMPARE] = self._asked(served.compare)
        return Service(models, Metrics(served), served.live, int(time.time()), self._timeout)

    def _asked(self, answerer: Answerer) -> Asked:
        context = answerer.context
        limits = Limits(context, self._most_prompt or context, self._most_new, answerer.vocabulary)
        return Asked(answerer, Prompts(answerer.tokenizer, limits))

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
            raise RunError(f"cannot listen on {host}:{port}: {error}; choose another port, or 0 for any") from error
        return listener


def _uvicorn(app: Any) -> uvicorn.Server:
    options: dict[str, Any] = {"interface": "asgi3", "http": "h11", "ws": "none", "lifespan": "off", "loop": "asyncio"}
    options |= {"log_config": None, "access_log": False, "server_header": False, "proxy_headers": False}
    return uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=GRACE_SECONDS, **options))
