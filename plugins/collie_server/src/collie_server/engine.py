"""The one thread that runs the model: it admits waiting answers, lets all grow by a token, and drops the finished.

What other threads do here is short and never waits for the model: hand in jobs, cancel them, ask how many there are.
"""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch

from collie_server.batch import Batch
from collie_server.sampling import Likelihood, Sampling, choose, likelihood
from collie_server.text import TextStream

logger = logging.getLogger("collie.server")

PREFILL_TOKENS = 4096  # of the prompts that are read in one pass: running answers wait for it

Finish = Literal["stop", "length", "timeout", "error", "closed"]


class QueueFull(Exception):
    """Too many answers wait already."""


class Closed(Exception):
    """The engine has been stopped."""


class Event(NamedTuple):
    """What happened to an answer: new text, its tokens, its end."""

    text: str = ""
    tokens: int = 0
    likelihood: Likelihood | None = None
    finish: Finish | None = None


@dataclass(eq=False)
class Job:
    """One answer.

    Attributes:
        prompt: token ids, at least one.
        deliver: called in the engine's thread with each event; it must not block.
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

    def end(self, reason: Finish, text: str = "") -> None:
        """Deliver the last event."""
        self.over = True
        self.deliver(Event(text, finish=reason))


class Engine:
    """Batches answers token by token.

    Args:
        model: a causal language model of transformers; it must not be used elsewhere meanwhile.
        tokenizer: of the model.
        ends: token ids that end an answer.
        slots: answers that grow at the same time.
        queue: answers that may wait.

    Raises:
        ModelError: the model cannot be batched.
    """

    def __init__(self, model: Any, tokenizer: Any, *, ends: Sequence[int], slots: int, queue: int) -> None:
        model.eval()
        self._batch = Batch(model)
        self._tokenizer = copy.deepcopy(tokenizer)  # another thread encodes, and one tokenizer cannot do both at once
        self._ends = frozenset(ends)
        self._slots = slots
        self._queue = queue
        self._waiting: deque[Job] = deque()
        self._rows: list[Job] = []
        self._next: list[int] = []  # the last token of each row, not yet in the batch
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="collie-engine", daemon=True)

    @property
    def capacity(self) -> int:
        """Answers that can be here at once, growing or waiting."""
        return self._slots + self._queue

    @property
    def load(self) -> tuple[int, int]:
        """Answers that grow, and that wait."""
        return sum(not job.over for job in list(self._rows)), len(self._waiting)

    @property
    def healthy(self) -> bool:
        """Whether jobs are being worked on."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def close(self, timeout: float = 2.0) -> None:
        """End every answer at once, and the thread after the pass that is running; wait so many seconds for it."""
        with self._changed:
            self._closed = True
            self._changed.notify()
            self._end([*self._rows, *self._waiting], "closed")
        if self._thread.is_alive():
            self._thread.join(timeout)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Let the jobs wait for their turn, all or none.

        Raises:
            QueueFull: too many wait.
            Closed: the engine has been stopped.
        """
        for job in jobs:
            job.text = TextStream(self._decode, job.sampling.stop)
            job.generator = job.sampling.generator()
        with self._changed:
            if self._closed:
                raise Closed
            if sum(self.load) + len(jobs) > self.capacity:
                raise QueueFull
            self._waiting.extend(jobs)
            self._changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Forget the jobs; nothing is delivered any more. Rows end with the pass that is running."""
        with self._changed:
            for job in jobs:
                job.over = True
                if job in self._waiting:
                    self._waiting.remove(job)

    # the thread

    def _run(self) -> None:
        while self._wait():
            try:
                self._expire()
                self._admit()
                if self._rows:
                    self._advance()
            except Exception:
                logger.exception("a forward pass failed; the answers in it are given up")
                self._end(self._rows, "error")
                self._rows, self._next = [], []
                self._batch.clear()
        self._end([*self._rows, *self._waiting], "closed")  # a job may have been taken while `close` looked

    def _wait(self) -> bool:
        """Until there is something to do; False: to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._rows or self._waiting)
            return not self._closed

    def _expire(self) -> None:
        now = time.monotonic()
        with self._changed:
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
        with self._changed:
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

    def _grow(self, jobs: Sequence[Job], logits: torch.Tensor) -> list[int]:
        """Choose the next token of each job by `logits`, [jobs, V], and tell the jobs."""
        tokens = choose(logits, [job.sampling for job in jobs], [job.generator for job in jobs])
        for job, token, row in zip(jobs, tokens, logits, strict=True):
            if not job.over:
                self._tell(job, token, row)
        return tokens

    def _tell(self, job: Job, token: int, logits: torch.Tensor) -> None:
        if token in self._ends:
            job.end("stop", job.text.finish())
            return
        count = job.sampling.logprobs
        named = None if count is None else likelihood(logits, token, count)
        job.tokens += 1
        text = job.text.push(token)
        last = job.tokens == job.sampling.max_tokens
        if last and not job.text.stopped:
            text += job.text.finish()
        job.deliver(Event(text, 1, named))
        if job.text.stopped or last:
            job.end("stop" if job.text.stopped else "length")

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
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))
