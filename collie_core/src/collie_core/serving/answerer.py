"""A model that answers many at once: it admits waiting answers, lets all grow by a token, and drops the finished.

One thread calls `turn`, and only there the model runs. What other threads do here is short and never waits for the
model: hand in jobs, cancel them, ask how many there are.
"""

from __future__ import annotations

import copy
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from collie_core.errors import RunError
from collie_core.generate import end_ids
from collie_core.model.virtual_tokens import virtual_tokens_of
from collie_core.serving.sampling import Likelihood, Sampling, choose, likelihood
from collie_core.serving.text import TextStream

logger = logging.getLogger("collie.server")

PREFILL_TOKENS = 4096  # of the prompts that are read in one pass: running answers wait for it

Finish = Literal["stop", "length", "timeout", "error", "closed"]


class QueueFull(Exception):
    """Too many answers wait already."""


class Closed(Exception):
    """No more answers are written."""


class Event(NamedTuple):
    """What happened to an answer: new text, its tokens, its end."""

    text: str = ""
    tokens: int = 0
    likelihood: Likelihood | None = None
    finish: Finish | None = None
    step: int | None = None  # the optimizer step whose weights chose the token; None: the weights do not change


@dataclass(eq=False)
class Job:
    """One answer.

    Attributes:
        prompt: token ids, at least one.
        deliver: called in the model's thread with each event; it must not block.
        deadline: by `time.monotonic()`.
    """

    prompt: Sequence[int]
    sampling: Sampling
    deliver: Callable[[Event], None]
    deadline: float
    over: bool = False  # finished or cancelled
    tokens: int = 0
    text: TextStream = field(init=False)
    generator: torch.Generator = field(init=False)

    def end(self, reason: Finish, text: str = "", step: int | None = None) -> None:
        """Deliver the last event."""
        self.over = True
        self.deliver(Event(text, finish=reason, step=step))


class Rows(Protocol):
    """What grows a token at a time: a `Batch`, or one that several ranks have together."""

    def join(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """See `Batch`."""

    def step(self, tokens: Sequence[int]) -> Tensor:
        """See `Batch`."""

    def keep(self, rows: Sequence[int]) -> None:
        """See `Batch`."""

    def clear(self) -> None:
        """See `Batch`."""


class Answerer:
    """Batches answers token by token.

    Args:
        model: a causal language model of transformers, or this rank's part of one; asked for its sizes alone.
        tokenizer: of the model; it is copied, since one tokenizer cannot serve two threads at once.
        rows: what runs the model.
        slots: answers that grow at the same time.
        queue: answers that may wait.
        name: what the model is, for people: a folder, for example.
        recovers: whether a failed pass costs its answers alone. Where several ranks take part it ends them all, since
            others may be in the midst of it.

    Attributes:
        tokenizer: a copy, for one other thread.
        context: tokens of prompt and answer together.
        vocabulary: token ids are below.
        step: the finished optimizer steps of the weights; None: they do not change.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        rows: Rows,
        *,
        slots: int = 32,
        queue: int = 128,
        name: str = "model",
        recovers: bool = True,
    ) -> None:
        config = model.config.get_text_config()
        self.name = name
        self.tokenizer = copy.deepcopy(tokenizer)
        positions = getattr(config, "max_position_embeddings", None) or 2**31
        self.context: int = positions - virtual_tokens_of(model).positions
        self.vocabulary: int = config.vocab_size
        self.step: int | None = None
        self._decoder = copy.deepcopy(tokenizer)
        self._ends = frozenset(end_ids(model, tokenizer))
        self._batch = rows
        self._slots, self._queue = slots, queue
        self._recovers = recovers
        self._waiting: deque[Job] = deque()
        self._rows: list[Job] = []
        self._next: list[int] = []  # the last token of each row, not yet in the batch
        self._lock = threading.Lock()
        self._closed = False
        self.wake: Callable[[], None] = lambda: None  # called when there is something new to do; it must not block

    @property
    def capacity(self) -> int:
        """Answers that can be here at once, growing or waiting."""
        return self._slots + self._queue

    @property
    def load(self) -> tuple[int, int]:
        """Answers that grow, and that wait."""
        return sum(not job.over for job in list(self._rows)), len(self._waiting)

    @property
    def busy(self) -> bool:
        """Whether `turn` has something to do."""
        return bool(self._rows or self._waiting)

    @property
    def closed(self) -> bool:
        """Whether no more answers are written."""
        return self._closed

    def close(self) -> None:
        """End every answer now; what the model's thread is in the midst of is lost."""
        with self._lock:
            self._closed = True
            self._end([*self._rows, *self._waiting], "closed")

    def submit(self, jobs: Sequence[Job]) -> None:
        """Let the jobs wait for their turn, all or none.

        Raises:
            QueueFull: too many wait.
            Closed: no more answers are written.
        """
        for job in jobs:
            job.text = TextStream(self._decode, job.sampling.stop)
            job.generator = job.sampling.generator()
        with self._lock:
            if self._closed:
                raise Closed
            if sum(self.load) + len(jobs) > self.capacity:
                raise QueueFull
            self._waiting.extend(jobs)
        self.wake()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Forget the jobs; nothing is delivered any more. Rows end with the pass that is running."""
        with self._lock:
            for job in jobs:
                job.over = True
                if job in self._waiting:
                    self._waiting.remove(job)

    def answer(self, text: str, *, timeout: float = 300.0, **sampling: Any) -> Iterator[str]:
        """What follows `text`, piece by piece as it is written. For one thread beside the model's.

        Args:
            text: of at least one token.
            timeout: seconds until it is given up.
            sampling: fields of `Sampling`; `max_tokens` is 256 without it, and never beyond the context.

        Raises:
            RunError: it was not finished, or the text is longer than the context.
        """
        ids = list(self.tokenizer(text)["input_ids"])
        ids = ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids
        if not 0 < len(ids) < self.context:
            raise RunError(f"a prompt may have 1 to {self.context - 1} tokens, and this one has {len(ids)}")
        room = min(sampling.pop("max_tokens", 256), self.context - len(ids))
        events: queue.Queue[Event] = queue.Queue()
        job = Job(ids, Sampling(room, **sampling), events.put, time.monotonic() + timeout)
        try:
            self.submit([job])
            while (event := events.get(timeout=timeout + 1)).finish is None:
                yield event.text
            if event.finish not in ("stop", "length"):
                raise RunError(f"the answer was given up: {event.finish}")
            yield event.text
        except (QueueFull, Closed, queue.Empty) as error:
            raise RunError(f"there is no answer: {type(error).__name__}") from error
        finally:
            self.cancel([job])

    # the model's thread

    def turn(self) -> None:
        """One pass over waiting prompts, if there is room for any, and one more token for every row."""
        try:
            self._expire()
            self._admit()
            if self._rows:
                self._advance()
        except Exception as error:
            if not self._recovers:
                raise
            logger.warning("a forward pass failed (%s: %s); its answers are given up", type(error).__name__, error)
            logger.debug("", exc_info=error)
            self._end(self._rows, "error")
            self._rows, self._next = [], []
            self._batch.clear()

    def _expire(self) -> None:
        now = time.monotonic()
        with self._lock:
            late = [job for job in self._waiting if job.deadline < now]
            for job in late:
                self._waiting.remove(job)
        self._end([*late, *(job for job in self._rows if job.deadline < now)], "timeout")
        self._drop_finished()

    def _admit(self) -> None:
        """Read the prompts of waiting jobs, as many as there is room for."""
        new = self._take()
        if new:
            self._rows += new  # now, so that a failure ends them too
            self._next += self._grow(new, self._batch.join([job.prompt for job in new]))
            self._drop_finished()

    def _take(self) -> list[Job]:
        new: list[Job] = []
        width = 0
        with self._lock:
            while self._waiting and len(self._rows) + len(new) < self._slots:
                width = max(width, len(self._waiting[0].prompt))
                if new and width * (len(new) + 1) > PREFILL_TOKENS:
                    break
                new.append(self._waiting.popleft())
        return new

    def _advance(self) -> None:
        """One more token for every row."""
        self._next = self._grow(self._rows, self._batch.step(self._next))
        self._drop_finished()

    def _grow(self, jobs: Sequence[Job], logits: Tensor) -> list[int]:
        """Choose the next token of each job by `logits`, [jobs, V], and tell the jobs."""
        tokens = choose(logits, [job.sampling for job in jobs], [job.generator for job in jobs])
        for job, token, row in zip(jobs, tokens, logits, strict=True):
            if not job.over:
                self._tell(job, token, row)
        return tokens

    def _tell(self, job: Job, token: int, logits: Tensor) -> None:
        if token in self._ends:
            job.end("stop", job.text.finish(), self.step)
            return
        count = job.sampling.logprobs
        named = None if count is None else likelihood(logits, token, count)
        job.tokens += 1
        text = job.text.push(token)
        last = job.tokens == job.sampling.max_tokens
        if last and not job.text.stopped:
            text += job.text.finish()
        job.deliver(Event(text, 1, named, step=self.step))
        if job.text.stopped or last:
            job.end("stop" if job.text.stopped else "length", step=self.step)

    def _drop_finished(self) -> None:
        kept = [place for place, job in enumerate(self._rows) if not job.over]
        if len(kept) < len(self._rows):
            self._batch.keep(kept)
            self._rows = [self._rows[place] for place in kept]
            self._next = [self._next[place] for place in kept]

    def _end(self, jobs: Sequence[Job], reason: Finish) -> None:
        for job in jobs:
            if not job.over:
                job.end(reason)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._decoder.decode(list(ids), skip_special_tokens=True))
