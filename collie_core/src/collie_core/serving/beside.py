"""A server beside a training run: it takes requests in a thread, and the training thread answers between two steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

from collie_core.evaluate.scoring import evaluating
from collie_core.model.build import load_pretrained
from collie_core.plugins import Plugins
from collie_core.serving.answerer import Answerer
from collie_core.serving.batch import Batch
from collie_core.serving.ranks import SharedBatch, Wire, follow
from collie_core.serving.served import Live, Served, ServerThread
from collie_core.serving.standalone import model_folder

if TYPE_CHECKING:
    from collie_core.config.server import ServerConfig
    from collie_core.hookspecs import Run
    from collie_core.parts import Parts

logger = logging.getLogger("collie")

BASE = "base"  # `server.compare`: the model that the run began with


class Allowance:
    """How long answers may take, so that they take at most a share of all time.

    Training earns it and answers use it. What is left over is lost, so that a long silence is not followed by a long
    pause of training. What the last pass took beyond it is owed.
    """

    def __init__(self, share: float) -> None:
        self._earned = share / (1 - share)  # seconds of answers for each second of training
        self._left = 0.0
        self._since = time.monotonic()

    def trained(self) -> None:
        """The time since the last question was one of training."""
        self._left = min(self._left, 0.0) + self._elapsed() * self._earned

    @property
    def left(self) -> bool:
        """Whether another pass may begin; the time since the last question was one of answers."""
        self._left -= self._elapsed()
        return self._left > 0

    def _elapsed(self) -> float:
        since, self._since = self._since, time.monotonic()
        return self._since - since


class ServerBeside:
    """The server of a run, as a callback; it has no effect in a run without `server:`.

    A context: leaving it ends the server. A server that dies costs the run a line of warning.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._section: ServerConfig | None = parts.config.server
        self._thread: ServerThread | None = None  # on the main rank, as long as it lives
        self._live = Live()
        self._allowance = Allowance(0.0 if self._section is None else self._section.train_share)

    def __enter__(self) -> ServerBeside:
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._thread.stop()
            self._thread = None

    @property
    def hooks(self) -> list[object]:
        """This one, where there is a server."""
        return [] if self._section is None else [self]

    def start(self) -> None:
        """Accept requests on the main rank, once the parts of the run stand.

        Raises:
            CollieError: the server does not start, or the model cannot be batched.
        """
        section, parts = self._section, self._parts
        if section is None:
            return
        parts.registry.load("server", section.type)  # on every rank: they compare what they have loaded
        _ = self._batch
        if parts.topology.is_main:
            server = parts.registry.build("server", section.type, config=section)
            self._thread = ServerThread(server, self._served)
            self._thread.start()

    def collie_run_start(self, run: Run) -> None:
        """Tell where it is."""
        self._live.step, self._live.max_steps, self._live.output_dir = run.step, run.max_steps, str(run.output_dir)
        self._allowance.trained()
        if self._thread is not None:
            run.facts["server"] = self._thread.where

    def collie_metrics(self, values: Mapping[str, Any]) -> None:
        """Keep the row for those who watch the run."""
        self._live.add(values)

    def collie_after_step(self, run: Run) -> None:
        """Answer for a while; on every rank."""
        if self._parts.topology.is_main:
            self._live.step = self._served.model.step = run.step
            self._answer()
        elif self._wire.takes_part and (message := self._wire.receive()) is not None:
            with self._answering():
                follow(self._batch, self._wire, message)

    # -- how ---------------------------------------------------------------------------------------------------

    @cached_property
    def _wire(self) -> Wire:
        return Wire(self._parts.topology, everyone=self._parts.config.parallel.zero_stage == 3)

    @cached_property
    def _batch(self) -> Batch:
        return Batch(self._parts.model, self._parts.device)

    @cached_property
    def _served(self) -> Served:
        assert self._section is not None
        sizes: dict[str, Any] = {"slots": self._section.max_batch_size, "queue": self._section.max_queue}
        parts, shared = self._parts, self._wire.shared
        model = Answerer(
            parts.model,
            parts.tokenizer,
            SharedBatch(self._batch, self._wire) if shared else self._batch,
            name=str(parts.config.train.output_dir),
            recovers=not shared,
            **sizes,
        )
        if self._section.compare is None:
            return Served(model, live=self._live)
        name, other = self._other_model(self._section.compare)
        return Served(model, Answerer(other, parts.tokenizer, Batch(other), name=name, **sizes), self._live)

    def _other_model(self, name: str) -> tuple[str, Any]:
        """The whole model to compare with, which the run's own tokenizer asks, so that both get the same prompt."""
        section = self._parts.config.model
        folder = str(section.model_name_or_path) if name == BASE else model_folder(name)
        section = section.model_copy(update={"model_name_or_path": folder, "config": None})
        registry = Plugins.discover(self._parts.config.plugins.block)  # not the run's, which lists what the run uses
        model = load_pretrained(section, registry, self._parts.tokenizer, self._parts.dtype)
        return folder, model.to(self._parts.device).eval()

    def _answer(self) -> None:
        self._allowance.trained()
        if self._thread is not None and (reason := self._thread.ending):
            logger.warning("the server has ended by itself (%s); training goes on without it", reason)
            self._thread = None
            self._served.close()
        if self._served.busy and self._allowance.left:
            with self._answering():
                while self._allowance.left and self._served.busy:
                    self._served.turn()
        self._wire.send(None)

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """The model as an evaluation has it; no random number is drawn that training would have drawn."""
        with evaluating(self._parts.model), self._parts.precision():
            yield
