"""The ranks of a run end together: when one fails or is lost, all others end within half a minute and say why.

Every rank holds one connection to a thread of rank 0 (`collie_core.hub`), over which nothing travels until there is
something to say: the kernels at both ends notice by themselves when a process ends (at once) and when a machine or
its network is gone (after `SILENCE_S`). That costs no time in training, and a process that is busy, stopped or hung
is not mistaken for a lost one: `parallel.timeout_s` is for those.

`collie train` watches in every process that torchrun or srun has started, from its first import on. In a program of
one's own the `Trainer` does it while it trains, but only in a process that a launcher has started (RANK, WORLD_SIZE,
MASTER_ADDR and MASTER_PORT are set): there, what one rank raises ends the others after `GRACE_S`.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from collie_core.errors import CollieError, RunError
from collie_core.hub import (
    ARRIVAL_S,
    FAREWELL_S,
    WITNESS_S,
    Hub,
    Member,
    Store,
    connect,
    failed,
    gone,
    messages,
    send,
    silent_for_long,
)

if TYPE_CHECKING:
    from collie_core.topology import Topology

GRACE_S = 5.0  # for a program whose ranks all raise, until those that do not are ended
_QUIET_S = 6.0  # for another process of this machine to speak, before the launcher hears of the end
_LONGEST = 50_000  # characters of a reason


@dataclass(frozen=True)
class Ending:
    """Why a run ends early."""

    sentence: str  # one line, or several where an error for people has several
    rank: int  # whose failure it is
    speaks: bool = False  # whether this process is the one to tell the people at its machine
    beside: bool = False  # whether the one that fails runs here too, and can tell by itself


class Watch:
    """The connection of this process to rank 0, and on rank 0 the hub.

    Args:
        member: this process.
        store: where rank 0 leaves word, under `key`, of where it is found.
        on_end: called in a thread once the run must end, unless this process is failing itself; see `fail`.
        master: a host on the way to which rank 0 listens.

    Raises:
        RunError: rank 0 cannot be found.
    """

    def __init__(
        self, member: Member, store: Store, key: str, on_end: Callable[[Watch, Ending], None], *, master: str
    ) -> None:
        self.member = member
        self._store = store  # on rank 0 it may be the server, which lives as long as somebody holds it
        self._on_end = on_end
        self._lock = threading.Lock()
        self._ending: Ending | None = None
        self._ended = threading.Event()
        self._here = True  # not failing by itself
        self._left = False
        self._hub = Hub.open(member, store, key, master) if member.rank == 0 else None
        self._rank_0, self._connection = connect(member, store, key)
        threading.Thread(target=self._listen, name="collie-watch", daemon=True).start()

    @classmethod
    def join(cls, on_end: Callable[[Watch, Ending], None]) -> Watch:
        """The watch of this launched process; there is one at a time."""
        global _current, _number
        if _number == 0:
            os.register_at_fork(after_in_child=_forget)
        _number += 1
        member, attempt = _this_process(), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        key = f"collie/watch/{attempt}/{_number}"
        _current = cls(member, _store(member), key, on_end, master=os.environ["MASTER_ADDR"])
        return _current

    def agree(self, facts: Mapping[str, str]) -> None:
        """What must be the same on all ranks. Where it is not, the run ends: this returns at once."""
        with suppress(OSError):
            send(self._connection, {"facts": dict(facts)})

    def fail(self, reason: str, *, witness: bool = False) -> Ending:
        """Tell all ranks that this one fails, and end the watch; returns what they are told.

        Args:
            reason: as people should read it.
            witness: it fails because others no longer answer, so that what happened to them explains more.
        """
        with self._lock:
            self._here = False
        if not self._ended.is_set():
            with suppress(OSError):
                send(self._connection, {"failed": reason[:_LONGEST], "witness": witness})
                self._ended.wait(WITNESS_S + GRACE_S)
        own = Ending(failed(self.member, reason), self.member.rank)
        ending = self._ending or own
        self._close()
        return own if ending.rank == self.member.rank else ending

    def leave(self) -> None:
        """The work is done. Rank 0 waits here until that is so for all."""
        with self._lock:
            self._here = False
        with suppress(OSError):
            send(self._connection, {"bye": True})
        self._close()

    @property
    def is_over(self) -> bool:
        """Whether this process has left or is failing by itself."""
        return not self._here

    def wait_for_others(self) -> None:
        """On rank 0: until the others know of a failure, but not for long."""
        if self._hub is not None:
            self._hub.wait(FAREWELL_S)

    def forget(self) -> None:
        """In a fork of this process, which must not keep its connection open."""
        self._connection.close()
        if self._hub is not None:
            self._hub.forget()

    def _listen(self) -> None:
        message: Mapping[str, Any] = {}
        sentence = gone(self._rank_0)
        try:
            message = next(messages(self._connection), {})
        except OSError as error:
            if not isinstance(error, ConnectionError):
                sentence = silent_for_long([self._rank_0])
        ending = Ending(sentence, 0, speaks=self.member.local_rank == int(self._rank_0.node == self.member.node))
        if message:
            speaks, beside = self.member.rank in message["speakers"], self.member.node == message["told_on"]
            ending = Ending(message["sentence"], message["rank"], speaks, beside)
        with self._lock:
            if self._left:
                return  # it was this process that ended the connection
            self._ending = ending
            self._ended.set()
            here = self._here
        if here:
            _shut(self._connection)  # so that rank 0 knows that we know
            self._on_end(self, ending)

    def _close(self) -> None:
        global _current
        if _current is self:
            _current = None
        with self._lock:
            self._left = True
        _shut(self._connection)
        if self._hub is not None:
            self._hub.wait(None if self._ending is None else FAREWELL_S)


_current: Watch | None = None
_number = 0  # of watches that this process has had: all ranks count alike


def _forget() -> None:
    global _current
    if _current is not None:
        _current.forget()
        _current = None


def is_launched() -> bool:
    """Whether a launcher has started this process as one of several."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return all(name in os.environ for name in names) and int(os.environ["WORLD_SIZE"]) > 1


@contextmanager
def watching(topology: Topology) -> Iterator[None]:
    """Watch over the ranks while a program trains; see the top of this file. An error inside is raised as ever.

    Where `collie` watches already, where one process trains alone or where no launcher has started it, this does
    nothing.
    """
    watched = _current is not None or "COLLIE_LAUNCHED" in os.environ  # there the launcher ends the others
    if watched or topology.world_size == 1 or not is_launched():
        yield
        return
    watch = Watch.join(_end_after_grace)
    try:
        yield
    except BaseException as error:
        watch.fail(reason_of(error), witness=is_witness(error))
        raise
    watch.leave()


# -- the end of a process -----------------------------------------------------------------------------------


def _end_after_grace(watch: Watch, ending: Ending) -> None:
    """Unless the ranks of the program all raise: then each can handle it, and nobody says a word."""
    time.sleep(GRACE_S)
    if not watch.is_over:
        end_process(watch, replace(ending, beside=False))


_ending = threading.Lock()  # never released: a process ends once


def end_process(watch: Watch, ending: Ending) -> None:
    """End this process now, for a failure elsewhere. Not through exit handlers: some wait for the other ranks."""
    _ending.acquire()
    leave_reason(ending.sentence)
    if ending.speaks and not ending.beside:
        print(ending.sentence, file=sys.stderr, flush=True)
    else:
        time.sleep(_QUIET_S)
    watch.wait_for_others()
    sys.stdout.flush()
    os._exit(1)


def leave_reason(sentence: str, *, details: str = "") -> None:
    """Write why this process ends to where torch's launchers look for it; `details` hold the stack of a bug."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is None:
        return
    now = time.time()  # in full: the launchers' own whole seconds do not tell who was first
    extra = {"py_callstack": details or sentence, "timestamp": str(int(now)), "time": now}
    with suppress(OSError), open(file, "w") as stream:
        json.dump({"message": {"message": sentence, "extraInfo": extra}}, stream)


def reason_of(error: BaseException) -> str:
    """The error in words: as it is where it was written for people, with its type otherwise."""
    if isinstance(error, CollieError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def is_witness(error: BaseException) -> bool:
    """Whether a collective failed: most likely because another rank is gone."""
    torch = sys.modules.get("torch.distributed")
    known = torch is not None and isinstance(error, torch.DistError)
    return known or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


# -- the launcher -------------------------------------------------------------------------------------------


def _this_process() -> Member:
    number = {name: int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    host = socket.gethostname()
    node = os.environ.get("GROUP_RANK") or os.environ.get("SLURM_NODEID") or host
    return Member(number["RANK"], number["WORLD_SIZE"], number["LOCAL_RANK"], host, node)


def _store(member: Member) -> Store:
    """The launcher's store, or the one on rank 0 that the process group will use too."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in its __all__

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_master = member.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    limit = timedelta(seconds=ARRIVAL_S)
    try:
        store: Store = TCPStore(
            address, port, member.world_size, is_master, limit, wait_for_workers=False, multi_tenant=True
        )
    except RuntimeError as error:
        raise RunError(f"{member} cannot reach the store at MASTER_ADDR={address}, port {port}: {error}") from error
    return store


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
