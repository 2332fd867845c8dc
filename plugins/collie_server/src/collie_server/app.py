"""The application: OpenAI's endpoints over the models, the pages, and what says how server and run are."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from collie_core.api import Answerer, Closed, Event, Live, QueueFull
from collie_server.answers import Answers, Indexed, Shape
from collie_server.errors import ApiError, invalid
from collie_server.guard import App, Guard, Receive, Scope, Send
from collie_server.metrics import Counted, Metrics, Watch
from collie_server.prompts import Prompts, sampling_of
from collie_server.schemas import ChatRequest, CompletionRequest, ErrorAnswer

logger = logging.getLogger("collie.server")

# Pages need nothing from elsewhere and may not be put into other pages.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
STEP = "Collie-Step"  # a header: the optimizer step of the weights; of a stream, when it begins
SLOW_READER_SECONDS = 60.0  # for taking the rest of a stream after the answer's own time is over


@dataclass(frozen=True)
class Asked:
    """A model, and how it is asked."""

    answerer: Answerer
    prompts: Prompts


@dataclass(frozen=True)
class Service:
    """What the endpoints work with."""

    models: Mapping[str, Asked]  # by the names that clients use; the first is asked where a request names none
    metrics: Metrics
    live: Live | None
    started: int  # Unix time
    timeout: float

    def asked(self, name: str | None) -> tuple[str, Asked]:
        """The model that a request means.

        Raises:
            ApiError: there is none of this name.
        """
        if name is None:
            return next(iter(self.models.items()))
        if name in self.models:
            return name, self.models[name]
        known = " and ".join(map(repr, self.models))
        message = f"the models served here are {known}" if len(self.models) > 1 else f"the model served here is {known}"
        raise ApiError(404, message, param="model", code="model_not_found")


def make_app(service: Service, *, token: str | None, max_body_bytes: int) -> App:
    """The whole application, guarded and counted."""
    refusals: dict[int | str, Any] = {"4XX": {"model": ErrorAnswer, "description": "What was wrong"}}
    app = FastAPI(title="CoLLiE", docs_url=None, redoc_url=None, responses=refusals)
    _add_error_handlers(app)
    _add_generation(app, service)
    _add_information(app, service)
    return Counted(Guard(app, token=token, max_body_bytes=max_body_bytes), service.metrics)


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def known(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        return invalid(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        return ApiError(error.status_code, str(error.detail), headers=error.headers).response()

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return ApiError(500, "the server failed; its log says how").response()


def _add_information(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The model that is served, and the one to compare it with, if there is one.

        `root` is where it comes from, `chat` whether it has a chat template.
        """
        fixed = {"object": "model", "created": service.started, "owned_by": "collie"}
        listed = [
            {"id": name, **fixed, "root": asked.answerer.name, "chat": asked.prompts.chats}
            for name, asked in service.models.items()
        ]
        return {"object": "list", "data": listed}

    @app.get("/health")
    async def health() -> JSONResponse:
        """200 while answers are being written, 503 when they cannot be."""
        answerers = [asked.answerer for asked in service.models.values()]
        running, waiting = (sum(one.load[place] for one in answerers) for place in (0, 1))
        closed = any(one.closed for one in answerers)
        state = {"status": "stopped" if closed else "ok", "running": running, "waiting": waiting}
        return JSONResponse(state, 503 if closed else 200)

    @app.get("/run")
    async def run(after: Annotated[int, Query(ge=0, lt=2**62)] = 0) -> dict[str, Any]:
        """The run beside which the server stands; `run` is null where there is none.

        `rows` are those of metrics.jsonl after the first `after`; ask again with `logged` for the next ones.
        """
        if (live := service.live) is None:
            return {"run": None, "logged": 0, "rows": []}
        logged, rows = live.after(after)
        facts = {"step": live.step, "max_steps": live.max_steps, "output_dir": live.output_dir}
        return {"run": facts, "logged": logged, "rows": [_finite(row) for row in rows]}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Numbers for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    for path, file in (("/", "page.html"), ("/docs", "api.html")):
        app.get(path, include_in_schema=False)(_page(file))


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }


def _page(file: str) -> Callable[[], Awaitable[Response]]:
    text = files("collie_server").joinpath(file).read_text(encoding="utf-8")

    async def page() -> Response:
        return HTMLResponse(text, headers=PAGE_HEADERS)

    return page


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """The next turn of a conversation."""
        name, asked = service.asked(body.model)
        ids = await asyncio.to_thread(asked.prompts.chat, body.messages)
        return await _answer(service, name, body, [ids], request)

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """What follows a text."""
        name, asked = service.asked(body.model)
        ids = await asyncio.to_thread(lambda: [asked.prompts.completion(prompt) for prompt in body.prompts])
        return await _answer(service, name, body, ids, request)


async def _answer(
    service: Service, name: str, body: ChatRequest | CompletionRequest, ids: Sequence[list[int]], request: Request
) -> Response:
    answerer, prompts = service.models[name].answerer, service.models[name].prompts
    _check(answerer, body, len(ids))
    ways = sampling_of(body, ids, prompts.limits)
    watch = Watch(service.metrics)
    try:
        answers = Answers(answerer, [one for one in ids for _ in range(body.n)], ways, service.timeout)
    except QueueFull:
        message = "too many requests are waiting; try again in a moment"
        raise ApiError(429, message, code="queue_full", headers={"Retry-After": "1"}) from None
    except Closed:
        raise ApiError(503, "the server is being stopped", code="closed") from None
    shape = Shape(prompts, name, chat=isinstance(body, ChatRequest))
    generation = Generation(service.metrics, answers, watch, sum(map(len, ids)), shape)
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        return EventStream(
            generation.stream(usage=usage),
            generation.finish,
            service.timeout + SLOW_READER_SECONDS,
            headers={} if answerer.step is None else {STEP: str(answerer.step)},
        )
    try:
        return await _unless_gone(generation.whole(), request)
    finally:
        generation.finish()


def _check(answerer: Answerer, body: ChatRequest | CompletionRequest, prompts: int) -> None:
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options: only together with stream: true", param="stream_options")
    if prompts * body.n > answerer.capacity:
        message = f"n: at most {answerer.capacity} answers can be written at once"
        raise ApiError(400, message, param="n")


class Generation:
    """The answers to one request, as a whole or as a stream."""

    def __init__(self, metrics: Metrics, answers: Answers, watch: Watch, prompt_tokens: int, shape: Shape) -> None:
        self._metrics = metrics
        self._answers = answers
        self._watch = watch
        self._prompt_tokens = prompt_tokens
        self._shape = shape

    async def whole(self) -> Response:
        """Everything at once."""
        choices: list[list[Event]] = [[] for _ in self._answers.jobs]
        async for batch in self._events():
            for index, event in batch:
                choices[index].append(event)
        body = self._shape.whole(choices, self._usage())
        return JSONResponse(body, headers={STEP: str(body["collie_step"])} if "collie_step" in body else {})

    async def stream(self, *, usage: bool) -> AsyncGenerator[bytes, None]:
        """Server-sent events. An error after the first of them is an event too."""
        try:
            async for batch in self._events():
                if chunk := self._shape.chunk(batch):
                    yield _event(chunk)
            if usage:
                yield _event(self._shape.usage_chunk(self._usage()))
            yield b"data: [DONE]\n\n"
        except ApiError as error:
            yield _event(error.body)

    async def _events(self) -> AsyncIterator[list[Indexed]]:
        async for batch in self._answers.events():
            self._watch.token()
            yield batch

    def _usage(self) -> dict[str, int]:
        completion = self._answers.completion_tokens
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self._prompt_tokens + completion,
        }

    def finish(self) -> None:
        """Free the slots of answers that nobody waits for any more, and count."""
        self._answers.close()
        metrics, usage = self._metrics, self._usage()
        metrics.prompt_tokens.inc(usage["prompt_tokens"])
        metrics.completion_tokens.inc(usage["completion_tokens"])
        metrics.duration.observe(self._watch.seconds)
        # Never a text at this level: logs are read by others than the texts are meant for.
        logger.info(
            "%d answers: %d + %d tokens in %.2f s",
            len(self._answers.jobs),
            usage["prompt_tokens"],
            usage["completion_tokens"],
            self._watch.seconds,
        )


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class EventStream(Response):
    """A stream that ends when its reader goes, or has not taken it in time."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        finish: Callable[[], None],
        timeout: float,
        headers: Mapping[str, str],
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no", **headers})
        del self.headers["content-length"]
        self._events = events
        self._finish = finish  # not the generator's own end: one that has not begun does not end either
        self._timeout = timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        writer = asyncio.ensure_future(self._write(send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({writer, gone}, timeout=self._timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._finish()
            await _cancel(gone)
            await _cancel(writer)
            await self._events.aclose()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _unless_gone(answer: Any, request: Request) -> Response:
    """The answer, given up when the client has gone."""
    writer = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({writer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if writer.done():
            response: Response = writer.result()
            return response
        return Response(status_code=499)  # nobody reads it; the number that nginx logs
    finally:
        await _cancel(gone)
        await _cancel(writer)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(task: asyncio.Future[Any]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError, ApiError):
        await task
