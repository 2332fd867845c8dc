"""Numbers for Prometheus, in a registry of their own: a program that embeds the server keeps its own numbers apart."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from collie_core.api import Served
from collie_server.guard import App, Message, Receive, Scope, Send

PATHS = frozenset(
    {
        "/",
        "/docs",
        "/openapi.json",
        "/health",
        "/metrics",
        "/run",
        "/v1/models",
        "/v1/completions",
        "/v1/chat/completions",
    }
)
SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class Metrics:
    """What `/metrics` tells."""

    def __init__(self, served: Served) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter("collie_requests", "Requests by path and status", ["path", "status"], registry=registry)
        self.prompt_tokens = Counter("collie_prompt_tokens", "Tokens of prompts", registry=registry)
        self.completion_tokens = Counter("collie_completion_tokens", "Tokens of answers", registry=registry)
        self.first_token = Histogram(
            "collie_first_token_seconds", "From a request to its first token", buckets=SECONDS, registry=registry
        )
        self.duration = Histogram(
            "collie_generation_seconds", "From a request to its last token", buckets=SECONDS, registry=registry
        )
        self._gauge("collie_running", "Answers being written", lambda: sum(one.load[0] for one in served.answerers))
        self._gauge("collie_waiting", "Answers waiting", lambda: sum(one.load[1] for one in served.answerers))
        if (live := served.live) is not None:
            self._gauge("collie_step", "Finished optimizer steps of the run", lambda: live.step)

    def _gauge(self, name: str, what: str, value: Callable[[], float]) -> None:
        Gauge(name, what, registry=self._registry).set_function(value)

    def text(self) -> bytes:
        """In the text format of Prometheus."""
        return generate_latest(self._registry)


class Counted:
    """Middleware of ASGI that counts requests. Paths that nobody serves are counted together."""

    def __init__(self, app: App, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                known = scope["path"] in PATHS
                self._metrics.requests.labels(scope["path"] if known else "other", message["status"]).inc()
            await send(message)

        await self._app(scope, receive, counting)


class Watch:
    """Times one request."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._start = time.monotonic()
        self._first = True

    def token(self) -> None:
        """A token has come."""
        if self._first:
            self._metrics.first_token.observe(self.seconds)
            self._first = False

    @property
    def seconds(self) -> float:
        """Since the request."""
        return time.monotonic() - self._start
