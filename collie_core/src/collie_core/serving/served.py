"""What a server is given, and the thread that it runs in: it takes requests and never touches a model."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from collie_core.errors import CollieError, RunError
from collie_core.hookspecs import Server
from collie_core.serving.answerer import Answerer

START_SECONDS = 60.0
STOP_SECONDS = 5.0
MOST_ROWS = 4096


@dataclass
class Live:
    """How the run stands beside which a server serves; read from any thread.

    Attributes:
        step: finished optimizer steps.
        max_steps: of the run.
        output_dir: of the run.
        logged: rows of metrics.jsonl so far; `rows` has the last of them.
    """

    step: int = 0
    max_steps: int = 0
    output_dir: str = ""
    logged: int = 0
    rows: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=MOST_ROWS))

    def add(self, row: Mapping[str, Any]) -> None:
        """One more row. In the thread that trains."""
        self.rows.append(dict(row))
        self.logged += 1

    def after(self, number: int) -> tuple[int, list[dict[str, Any]]]:
        """How many rows there have been, and those after the first `number`, as far as they are kept."""
        logged, rows = self.logged, list(self.rows)
        return logged, rows[max(0, len(rows) - max(0, logged - number)) :]


@dataclass(frozen=True)
class Served:
    """The models that a server may ask, from its own threads.

    Attributes:
        model: the one that is served; beside a run that of the moment.
        compare: another one to compare it with.
        live: the run; None: there is none, the weights do not change.
    """

    model: Answerer
    compare: Answerer | None = None
    live: Live | None = None

    @property
    def answerers(self) -> tuple[Answerer, ...]:
        """Both models."""
        return (self.model,) if self.compare is None else (self.model, self.compare)

    @property
    def busy(self) -> bool:
        """Whether `turn` has something to do."""
        return any(answerer.busy for answerer in self.answerers)

    def turn(self) -> None:
        """In the models' thread: a pass of each that has something to do."""
        for answerer in self.answerers:
            if answerer.busy:
                answerer.turn()

    def close(self) -> None:
        """End every answer."""
        for answerer in self.answerers:
            answerer.close()


class ServerThread:
    """A server in a thread of its own, and what became of it."""

    def __init__(self, server: Server, served: Served) -> None:
        self._server = server
        self._served = served
        self._ready = threading.Event()
        self._ended = self._stopping = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="collie-server", daemon=True)
        self.where = ""  # what to tell a person, once it is ready

    def start(self) -> None:
        """Until requests are accepted.

        Raises:
            CollieError: it has ended instead, or does not come.
        """
        self._thread.start()
        if not self._ready.wait(START_SECONDS):
            raise RunError(f"the server was not ready after {START_SECONDS:g} s")
        if not self.where:
            if isinstance(self._failure, CollieError):
                raise self._failure
            raise RunError(f"the server did not start: {self.ending}") from self._failure

    @property
    def ending(self) -> str:
        """Why it has ended by itself; "" while it has not."""
        if not self._ended or self._stopping:
            return ""
        error = self._failure
        return "it returned" if error is None else str(error) if isinstance(error, CollieError) else repr(error)

    def stop(self) -> None:
        """End open answers, then the server; waits some seconds for it."""
        self._stopping = True
        self._served.close()
        self._server.stop()
        self._thread.join(STOP_SECONDS)

    def _run(self) -> None:
        try:
            self._server.serve(self._served, self._announce)
        except BaseException as error:  # noqa: BLE001  (told by the thread that looks after it)
            self._failure = error
        finally:
            self._ended = True
            self._ready.set()

    def _announce(self, where: str) -> None:
        self.where = where
        self._ready.set()
