"""The ranks of a run end together: when one fails or is lost, all others end within half a minute and say why.

Every rank holds one connection to a thread of rank 0 (`collie_core.hub`), over which nothing travels until there is
something to say: the kernels at both ends notice by themselves when a process ends (at once) and when a machine or
its network is gone (after `SILENCE_S`). That costs no time in training, and a process that is busy, stopped or hung
is not mistaken for a lost one. Those are found by `collie_core.hang` after `parallel.timeout_s`: then every rank is
asked over its connection where it stands.

`collie train` watches in every process that it, torchrun or srun has started, as soon as it has read its file. In a
program of one's own the `Trainer` does it while it trains, but only in a process that a launcher has started (RANK,
WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set): there, what one rank raises ends the others after `GRACE_S`.
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
from functools import partial
from typing import TYPE_CHECKING, Any

from collie_core.errors import CollieError
from collie_core.hang import Monitor, Progress, as_message, explain
from collie_core.hub import (
    ANSWER_S,
    ARRIVAL_S,
    FAREWELL_S,
    WITNESS_S,
    Fault,
    Hub,
    Member,
    Store,
    connect,
    failed,
    gone,
    members,
    messages,
    send,
    silent_for_long,
)

if TYPE_CHECKING:
    from collie_core.topology import Topology

OURS = "COLLIE_LAUNCHED"  # set for the processes that `collie_core.launch.start` starts
STORE_FD = "COLLIE_STORE_FD"  # of a socket that listens at MASTER_PORT, for rank 0 to take over
GRACE_S = 5.0  # for a program whose ranks all raise, until those that do not are ended
_QUIET_S = 6.0  # for another process of this machine to speak, before the launcher hears of the end
_LOOKS_EVERY_S = 0.1  # whether the main rank has come
_LONGEST = 50_000  # characters of a reason


@dataclass(frozen=True)
class Ending:
    """Why a run ends early."""

    sentence: str  # one line, or several where an error for people has several
    rank: int  # whose failure it is
    details: str = ""  # the stacks of ranks that hang
    code: int = 1  # with which all ranks exit
    mends: bool = True  # whether all may be well in another start
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
        Fault: rank 0 cannot be found.
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
        self._sending = threading.Lock()
        self._heard = threading.Event()
        self.progress = Progress()
        self._monitor: Monitor | None = None
        self.key = key
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
        self._send({"facts": dict(facts)})

    def limit(self, seconds: float) -> None:
        """From now on the thread that calls this must not stand still for longer in a run, or wait for other ranks."""
        self.progress.thread = threading.get_ident()
        if self._monitor is not None:
            self._monitor.stop()
        self._monitor = Monitor(self.progress, seconds, self._stuck)

    def first_says(self, question: str, answer: str) -> str:
        """What the rank that comes first answers to a question, on all ranks."""
        return self._store.compare_set(f"{self.key}/{question}", "", answer).decode()

    def tell(self, name: str) -> None:
        """Something that `is_told` knows of from then on, on all ranks."""
        self._store.set(f"{self.key}/{name}", "1")

    def is_told(self, name: str) -> bool:
        """Whether any rank has told it."""
        return self._store.check([f"{self.key}/{name}"])

    def fail(self, reason: str, *, witness: bool = False, code: int = 1, mends: bool = True) -> Ending:
        """Tell all ranks that this one fails, and end the watch; returns what they are told.

        Args:
            reason: as people should read it.
            witness: it fails because others no longer answer, so that what happened to them explains more.
            code: with which all ranks exit; 0: this one does not fail, but leaves.
            mends: whether all may be well in another start.
        """
        with self._lock:
            self._here = False
        sentence = reason if code == 0 else failed(self.member, reason)
        if not self._ended.is_set():
            message = {"failed": sentence[:_LONGEST], "witness": witness, "code": code, "mends": mends}
            if self._send(message):
                self._ended.wait(WITNESS_S + GRACE_S)
        own = Ending(sentence, self.member.rank, code=code, mends=mends)
        ending = self._ending or own
        self._close()
        return own if ending.rank == self.member.rank else ending

    def leave(self) -> None:
        """The work is done. Rank 0 waits here until that is so for all."""
        with self._lock:
            self._here = False
        self._send({"bye": True})
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
            message = next(self._verdicts(), {})
        except OSError as error:
            if not isinstance(error, ConnectionError):
                sentence = silent_for_long([self._rank_0])
        ending = Ending(sentence, 0, speaks=self._speaks_of_rank_0)
        if message:
            speaks, beside = self.member.rank in message["speakers"], self.member.node == message["told_on"]
            facts = {name: message[name] for name in ("sentence", "rank", "details", "code", "mends")}
            ending = Ending(**facts, speaks=speaks, beside=beside)
        self._end(ending)

    def _verdicts(self) -> Iterator[Mapping[str, Any]]:
        """What is told of the end; questions in between are answered."""
        for message in messages(self._connection):
            self._heard.set()
            if "report" not in message:
                yield message
            elif self._monitor is not None:
                self._send({"status": as_message(self._monitor.status())})

    def _end(self, ending: Ending) -> None:
        with self._lock:
            if self._left or self._ending is not None:
                return  # it was this process that ended the connection
            self._ending = ending
            self._ended.set()
            here = self._here
        if self._monitor is not None:
            self._monitor.stop()
        if here:
            _shut(self._connection)  # so that rank 0 knows that we know
            self._on_end(self, ending)

    @property
    def _speaks_of_rank_0(self) -> bool:
        """Whether this process tells the people at its machine what happened to rank 0, which tells nobody."""
        return self.member.local_rank == int(self._rank_0.node == self.member.node)

    def _stuck(self) -> None:
        """Let rank 0 ask everybody; if it does not, it is rank 0 that hangs."""
        assert self._monitor is not None
        self._heard.clear()
        self._send({"stuck": self._monitor.limit_s})
        if self._heard.wait(2 * ANSWER_S):
            return
        own = {self.member.rank: self._monitor.status()}
        found = explain(own, [0], limit_s=self._monitor.limit_s, name=partial(members, [self._rank_0, self.member]))
        if found is not None:
            self._end(Ending(found.sentence, 0, found.stacks, speaks=self._speaks_of_rank_0))

    def _send(self, message: Mapping[str, Any]) -> bool:
        """Whether it is on its way."""
        with self._sending, suppress(OSError):
            send(self._connection, message)
            return True
        return False

    def _close(self) -> None:
        global _current
        if _current is self:
            _current = None
        with self._lock:
            self._left = True
        if self._monitor is not None:
            self._monitor.stop()
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


def agreed(question: str, *, wish: bool) -> bool:
    """Whether a rank wishes something, as the first that asks knows it; the same on all ranks.

    Without a watch over several ranks nobody could agree, and the answer is no. A process alone does as it wishes.
    """
    if _current is None:
        return wish and int(os.environ.get("WORLD_SIZE", "1")) == 1
    subject = question.partition("/")[0]
    if wish:
        _current.tell(subject)
    return _current.first_says(question, "yes" if wish or _current.is_told(subject) else "no") == "yes"


def reached_by_main(place: str) -> None:
    """Wait for the main rank to come here too, before there is a process group; for as long as it takes.

    It is not waited for where nobody watches over several ranks.
    """
    if _current is None:
        return
    if _current.member.rank == 0:
        _current.tell(place)
    while not _current.is_told(place):
        time.sleep(_LOOKS_EVERY_S)


def limit(seconds: float) -> None:
    """Let the watch of this process, if there is one, find what stands still for so long; see `Watch.limit`."""
    if _current is not None:
        _current.limit(seconds)


@contextmanager
def watching(topology: Topology, timeout_s: float) -> Iterator[Progress]:
    """Watch over the ranks while a program trains; see the top of this file. An error inside is raised as ever.

    Where `collie` watches already, where one process trains alone or where no launcher has started it, nothing more is
    watched. What it gives is for signs of life.

    Args:
        topology: of the run.
        timeout_s: how long a rank may stand still.
    """
    alone = topology.world_size == 1 or not is_launched()
    watch = None if _current is not None or alone else Watch.join(_end_after_grace)
    limit(timeout_s)
    progress = Progress() if _current is None else _current.progress
    progress.groups = topology.groups
    try:
        yield progress
    except BaseException as error:
        if watch is not None:
            watch.fail(reason_of(error), witness=is_witness(error))
        raise
    if watch is not None:
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
    leave_reason(ending.sentence, details=ending.details, mends=ending.mends, about=ending.rank)
    if OURS in os.environ:
        pass  # the launcher speaks, or for a run that leaves the rank that was asked
    elif ending.speaks and not ending.beside:
        print("\n".join(filter(None, (ending.details, ending.sentence))), file=sys.stderr, flush=True)
    else:
        time.sleep(_QUIET_S)
    watch.wait_for_others()
    sys.stdout.flush()
    os._exit(ending.code)


def leave_reason(sentence: str, *, details: str = "", mends: bool = True, about: int | None = None) -> None:
    """Write why this process ends to where launchers look for it: ours and torch's.

    Args:
        sentence: as people read it.
        details: the stack of a bug, or those of ranks that hang.
        mends: whether all may be well in another start.
        about: the rank whose failure it is; None: this one's.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is None:
        return
    now = time.time()  # in full: the launchers' own whole seconds do not tell who was first
    extra = {"py_callstack": details or sentence, "timestamp": str(int(now)), "time": now}
    extra |= {"details": details, "mends": mends, "about": about}
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
    within = timedelta(seconds=ARRIVAL_S)
    options: dict[str, Any] = {"wait_for_workers": False, "multi_tenant": True}
    if is_master and STORE_FD in os.environ:
        options["master_listen_fd"] = int(os.environ.pop(STORE_FD))
    try:
        store: Store = TCPStore(address, port, member.world_size, is_master, within, **options)
    except RuntimeError as error:
        raise Fault(f"{member} cannot reach the store at MASTER_ADDR={address}, port {port}: {error}") from error
    return store


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
