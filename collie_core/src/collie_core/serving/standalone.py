"""A server alone: a model that does not change, until somebody says that it is enough."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collie_core import launch, starter
from collie_core.errors import RunError
from collie_core.hookspecs import Server
from collie_core.model.build import ALONE
from collie_core.serving.answerer import Answerer
from collie_core.serving.batch import Batch
from collie_core.serving.ranks import IDLE, SharedBatch, Wire, follow
from collie_core.serving.served import Served, ServerThread
from collie_core.topology import Topology

if TYPE_CHECKING:
    from collie_core.config.parallel import ParallelConfig

IDLE_SECONDS = 0.25  # between two looks at the server, and two signs of life to the other ranks


def model_folder(path: str) -> str:
    """The model of a folder of a run or a checkpoint; any other folder or hub id as it is."""
    inside = Path(path) / "model"
    own = any((Path(path) / name).exists() for name in ("config.json", "adapter_config.json"))
    return str(inside) if inside.is_dir() and not own else path


def on_ranks(processes: int | None, parallel: ParallelConfig, arguments: Sequence[str], work: Callable[[], int]) -> int:
    """Do `work` in as many processes as hold a copy of the model, in each of which `collie` starts with `arguments`.

    Args:
        processes: how many, if somebody has said so.
        parallel: how they share the model.

    Raises:
        RunError: their number is another, or one has failed.
    """
    with launch.reported_to_launcher() as agree:
        wanted = launch.processes_to_start(processes, parallel)
        if processes is None:  # not one for every GPU
            wanted = min(wanted, parallel.fewest_processes)
        if wanted > 1:
            return starter.start(wanted, arguments)
        agree({})
        return work()


def serve(
    server: Server,
    model: Any,
    tokenizer: Any,
    *,
    compare: tuple[Any, Any] | None = None,
    names: tuple[str, str] = ("model", "compare"),
    slots: int = 32,
    queue: int = 128,
    topology: Topology = ALONE,
    ready: Callable[[str], None] = lambda where: None,
    stop: threading.Event | None = None,
) -> None:
    """Let a server answer with a model, which runs in this thread, until `stop` is set.

    On several ranks all call it: the server and `stop` are those of the first, and the others end with it.

    Args:
        server: what takes requests, not started; used on the first rank alone.
        model: a causal language model of transformers, or this rank's part of one.
        tokenizer: of the model.
        compare: another whole model and its tokenizer, on the first rank.
        names: of both models, for people.
        slots, queue: see `Answerer`.
        topology: of the ranks.
        ready: told where the server is, once requests are accepted.
        stop: set from any thread or signal handler; answers end with the pass that is running.

    Raises:
        CollieError: the server does not start, or ends by itself; or the model cannot be batched.
    """
    if topology.dp.size > 1:
        needed = topology.model.size
        raise RunError(
            f"{needed} processes hold this model, and {topology.world_size} were started; set --nproc {needed}"
        )
    model.eval()
    wire, batch = Wire(topology), Batch(model, topology.device if topology.world_size > 1 else None)
    if not topology.is_main:
        follow(batch, wire, wire.receive())
        return
    sizes: dict[str, Any] = {"slots": slots, "queue": queue}
    rows = SharedBatch(batch, wire) if wire.shared else batch
    answerer = Answerer(model, tokenizer, rows, name=names[0], recovers=not wire.shared, **sizes)
    other = None
    if compare is not None:
        other = Answerer(compare[0].eval(), compare[1], Batch(compare[0]), name=names[1], **sizes)
    served = Served(answerer, other)
    thread = ServerThread(server, served)
    try:
        thread.start()
        ready(thread.where)
        _work(served, thread, wire, stop or threading.Event())
    finally:
        thread.stop()
    wire.send(None)


def _work(served: Served, thread: ServerThread, wire: Wire, stop: threading.Event) -> None:
    news = threading.Event()
    for answerer in served.answerers:
        answerer.wake = news.set
    while not stop.is_set():
        if reason := thread.ending:
            raise RunError(f"the server has ended by itself: {reason}")
        if served.busy:
            served.turn()
        elif news.wait(IDLE_SECONDS):
            news.clear()
        else:
            wire.send(IDLE)  # the others wait for a message, and not for ever
