"""The answers to one request: events out of the model's thread, and the shape that clients expect them in."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple
from uuid import uuid4

from collie_core.api import Answerer, Event, Job, Likelihood, Sampling
from collie_server.errors import ApiError
from collie_server.prompts import Prompts

LEAST_LOGPROB = -9999.0  # JSON has no infinity

PATIENCE_SECONDS = 1.0  # beyond the time of a request, for the model's thread to say that it is over

FAILURES = {
    "timeout": (504, "the answer took too long and was given up"),
    "error": (500, "the model failed; the server's log says how"),
    "closed": (503, "the server is being stopped"),
}


class Indexed(NamedTuple):
    """An event and the answer that it belongs to."""

    answer: int
    event: Event


class Answers:
    """The answers to one request, growing. To be closed, which frees what has not finished.

    Args:
        answerer: what writes them.
        prompts: token ids, one for each way of `ways`.
        ways: how they are sampled.
        timeout: seconds until they are given up.

    Raises:
        QueueFull, Closed: see `Answerer.submit`.
    """

    def __init__(
        self, answerer: Answerer, prompts: Sequence[Sequence[int]], ways: Sequence[Sampling], timeout: float
    ) -> None:
        self._answerer = answerer
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Indexed] = asyncio.Queue()  # bounded by the lengths of the answers
        deadline = time.monotonic() + timeout
        self.jobs = [
            Job(prompt, way, self._deliverer(index), deadline)
            for index, (prompt, way) in enumerate(zip(prompts, ways, strict=True))
        ]
        self.completion_tokens = 0
        answerer.submit(self.jobs)
        # The model's thread looks at the time between two steps of a run, which may be far apart.
        late = Indexed(0, Event(finish="timeout"))
        self._timer = self._loop.call_later(timeout + PATIENCE_SECONDS, self._events.put_nowait, late)

    def _deliverer(self, index: int) -> Any:
        def deliver(event: Event) -> None:  # in the model's thread
            with suppress(RuntimeError):  # the loop is closed: a pass has outlived the server
                self._loop.call_soon_threadsafe(self._events.put_nowait, Indexed(index, event))

        return deliver

    async def events(self) -> AsyncIterator[list[Indexed]]:
        """What has happened since the last time, again and again until every answer has ended.

        Raises:
            ApiError: an answer was given up.
        """
        running = len(self.jobs)
        while running:
            batch = [await self._events.get()]
            while not self._events.empty():
                batch.append(self._events.get_nowait())
            for _, event in batch:
                self.completion_tokens += event.tokens
                running -= event.finish is not None
                if event.finish in FAILURES:
                    status, message = FAILURES[event.finish]
                    raise ApiError(status, message, code=event.finish)
            yield batch

    def close(self) -> None:
        """Nobody waits for them any more."""
        self._timer.cancel()
        self._answerer.cancel([job for job in self.jobs if not job.over])


class Shape:
    """How the answers of one endpoint look.

    Args:
        prompts: names tokens.
        model: its name.
        chat: messages of a chat, or plain texts.
    """

    def __init__(self, prompts: Prompts, model: str, *, chat: bool) -> None:
        self._prompts = prompts
        self._chat = chat
        self._offsets: dict[int, int] = {}  # characters of the tokens named so far
        self._begun: set[int] = set()
        self._seen: list[int] = []  # the first and the last step of the weights so far
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, choices: list[list[Event]], usage: dict[str, int]) -> dict[str, Any]:
        """The answer of a request that is not streamed."""
        kind = "chat.completion" if self._chat else "text_completion"
        listed = [self._choice(index, events, streamed=False) for index, events in enumerate(choices)]
        steps = self._steps([event for events in choices for event in events])
        return {**self._head, **steps, "object": kind, "choices": listed, "usage": usage}

    def chunk(self, batch: Sequence[Indexed]) -> dict[str, Any] | None:
        """One chunk of a stream; None when there is nothing to tell yet."""
        grouped: dict[int, list[Event]] = {}
        for index, event in batch:
            grouped.setdefault(index, []).append(event)
        told = {index: events for index, events in grouped.items() if any(map(_tells, events))}
        choices = [self._choice(index, events, streamed=True) for index, events in told.items()]
        events = [event for index in told for event in told[index]]
        return self._chunk(choices) | self._steps(events) if choices else None

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        """The chunk after the last choice has ended."""
        return self._chunk([]) | {"usage": usage}

    def _steps(self, events: Sequence[Event]) -> dict[str, int]:
        """Of the weights that chose the last token and the first, their optimizer steps; {} where weights are fixed."""
        self._seen += [event.step for event in events if event.step is not None]
        self._seen = [min(self._seen), max(self._seen)] if self._seen else []
        return {"collie_step": self._seen[1], "collie_first_step": self._seen[0]} if self._seen else {}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices}

    def _choice(self, index: int, events: Sequence[Event], *, streamed: bool) -> dict[str, Any]:
        text = "".join(event.text for event in events)
        finish = next((event.finish for event in events if event.finish), None)
        named = [event.likelihood for event in events if event.likelihood]
        end = {"logprobs": self._logprobs(index, named) if named else None, "finish_reason": finish}
        if not self._chat:
            return {"index": index, "text": text} | end
        message: dict[str, Any] = {"content": text}
        if index not in self._begun:
            message = {"role": "assistant", **message}
            self._begun.add(index)
        return {"index": index, "delta" if streamed else "message": message} | end

    def _logprobs(self, index: int, named: Sequence[Likelihood]) -> dict[str, Any]:
        if self._chat:
            return {"content": [self._entry(*one[:2]) | {"top_logprobs": self._top(one)} for one in named]}
        tokens = [self._prompts.name(one.token) for one in named]
        return {
            "tokens": tokens,
            "token_logprobs": [_finite(one.logprob) for one in named],
            "top_logprobs": [self._by_name(one) for one in named],
            "text_offset": [self._offset(index, token) for token in tokens],
        }

    def _by_name(self, one: Likelihood) -> dict[str, float]:
        # The likeliest last: several tokens that are parts of characters have one name, and the likeliest keeps it.
        return {self._prompts.name(token): _finite(value) for token, value in reversed(one.top)}

    def _top(self, one: Likelihood) -> list[dict[str, Any]]:
        return [self._entry(token, value) for token, value in one.top]

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._prompts.name(token)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}

    def _offset(self, index: int, token: str) -> int:
        before = self._offsets.get(index, 0)
        self._offsets[index] = before + len(token)
        return before


def _tells(event: Event) -> bool:
    return bool(event.text or event.finish or event.likelihood)


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
