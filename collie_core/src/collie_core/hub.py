"""Rank 0's side of `collie_core.watch`: a thread to which every rank holds one connection, and what goes over it.

A message is a line of JSON. A rank says who it is, then nothing until it fails, hangs or has finished; the hub says who
is welcome, and then nothing until it asks all ranks where they stand, or tells them why the run ends.
"""

from __future__ import annotations

import hmac
import json
import re
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby, zip_longest
from typing import Any, Protocol

from collie_core.errors import RunError
from collie_core.hang import Explanation, Status, explain

SILENCE_S = 15.0  # without a sign of life from a machine
ARRIVAL_S = 300.0  # from rank 0 to the last, and for rank 0 to be found
WITNESS_S = 3.0  # a rank that only lost its partner waits so long for what happened to the partner
ANSWER_S = 5.0  # for a rank to say where it stands
FAREWELL_S = 10.0  # for those that come late, to hear that the run has ended
_SEND_S = 2.0  # messages are small: they leave at once or never
_LONGEST = 1 << 20  # bytes of a message


class Fault(RunError):
    """A rank, its machine or the network is lost: all may be well in another start."""


class Store(Protocol):
    """What is needed of torch's key-value stores."""

    def set(self, key: str, value: str) -> None:
        """For all ranks."""

    def get(self, key: str) -> bytes:
        """Waits until somebody has set it; RuntimeError when that takes too long."""

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Set it if it is as expected, which is "" where nobody has set it; the value from then on."""

    def check(self, keys: list[str]) -> bool:
        """Whether somebody has set them."""


@dataclass(frozen=True)
class Member:
    """A process of the run."""

    rank: int
    world_size: int
    local_rank: int
    host: str
    node: str  # the launcher's number of the machine: not every machine has a name of its own

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world_size} on {self.host}"


class Hub:
    """Hears of every failure and tells all ranks of the first.

    Args:
        world_size: ranks of the run.
        server: where they connect.
        token: what they must know; a stranger is not heard.
    """

    def __init__(self, world_size: int, server: socket.socket, token: str) -> None:
        self.world_size = world_size
        self.token = token
        self._server = server
        self._selector = selectors.DefaultSelector()
        self._selector.register(server, selectors.EVENT_READ)
        self._guests: set[_Guest] = set()
        self._facts: dict[Member, dict[str, str]] = {}  # that the ranks must agree on
        self._arrived: set[int] = set()
        self._finished: set[int] = set()
        self._rumour: tuple[float, Member, str] | None = None  # until when to wait for a better explanation
        self._roll: dict[int, Status] | None = None  # who has said where it stands, while they are asked
        self._roll_until = self._limit_s = 0.0
        self._verdict: dict[str, Any] | None = None
        self._arrival_until = time.monotonic() + ARRIVAL_S
        self._farewell_until = 0.0
        self._thread = threading.Thread(target=self._serve, name="collie-hub", daemon=True)
        self._thread.start()

    @classmethod
    def open(cls, member: Member, store: Store, key: str, master: str) -> Hub:
        """Start it on the way to the host `master`, and leave word of it in the store."""
        published, bound = _addresses(master)
        family = socket.AF_INET6 if ":" in bound else socket.AF_INET
        server = socket.create_server((bound, 0), family=family, backlog=min(member.world_size, 4096))
        hub = cls(member.world_size, server, secrets.token_hex(16))
        where = {"host": published, "port": server.getsockname()[1], "token": hub.token, "member": asdict(member)}
        store.set(key, json.dumps(where))
        return hub

    def wait(self, timeout: float | None) -> None:
        """Until everyone has left, or knows why the run has failed."""
        self._thread.join(timeout)

    def forget(self) -> None:
        """In a fork of rank 0, which must not keep the connections open."""
        self._selector.close()
        for connection in (self._server, *(guest.connection for guest in self._guests)):
            connection.close()

    def _serve(self) -> None:
        while not self._is_over():
            for key, _ in self._selector.select(timeout=1.0):
                if key.data is None:
                    self._accept()
                elif key.data in self._guests:  # not dropped a moment ago
                    self._read(key.data)
            self._check_time()
        self._server.close()
        for guest in list(self._guests):
            self._drop(guest)

    def _is_over(self) -> bool:
        if len(self._finished) == self.world_size:
            return True
        if self._verdict is None:
            return False
        all_know = len(self._arrived) == self.world_size and not self._guests
        return all_know or time.monotonic() > self._farewell_until

    def _accept(self) -> None:
        with suppress(OSError):
            connection, _ = self._server.accept()
            notice_silence(connection)
            connection.settimeout(_SEND_S)
            guest = _Guest(connection)
            self._guests.add(guest)
            self._selector.register(connection, selectors.EVENT_READ, guest)

    def _read(self, guest: _Guest) -> None:
        try:
            received = guest.connection.recv(1 << 16)
        except OSError as error:
            self._lost(guest, silent=not isinstance(error, ConnectionError))
            return
        guest.pending += received
        *lines, guest.pending = guest.pending.split(b"\n")
        for line in lines:
            self._hear(guest, parse(line))
        if not received or len(guest.pending) > _LONGEST:
            self._lost(guest, silent=False)

    def _hear(self, guest: _Guest, message: dict[str, Any]) -> None:
        if guest.member is None:
            if hmac.compare_digest(str(message.get("token")).encode(), self.token.encode()):
                self._welcome(guest, Member(**message["member"]))
        elif "facts" in message:
            self._facts[guest.member] = message["facts"]
            self._compare_facts()
        elif "failed" in message:
            guest.parted = True
            sentence = message["failed"]
            if not message["witness"]:
                code, mends = message["code"], message["mends"]
                self._decide(sentence, guest.member.rank, told_by=guest.member, code=code, mends=mends)
            elif self._rumour is None:
                self._rumour = (time.monotonic() + WITNESS_S, guest.member, sentence)
        elif "stuck" in message:
            self._call_the_roll(message["stuck"])
        elif "status" in message and self._roll is not None:
            self._roll[guest.member.rank] = Status(**message["status"])
            self._judge()
        elif "bye" in message:
            guest.parted = True
            self._finished.add(guest.member.rank)

    def _welcome(self, guest: _Guest, member: Member) -> None:
        guest.member = member
        self._arrived.add(member.rank)
        self._tell(guest, {"welcome": True})
        if self._verdict is not None:
            self._tell(guest, self._verdict)

    def _lost(self, guest: _Guest, *, silent: bool) -> None:
        self._drop(guest)
        member = guest.member
        if member is None or guest.parted or self._verdict is not None:
            return
        if not silent:
            self._decide(gone(member), member.rank)
            return
        beside = [other for other in self._guests if other.member and other.member.node == member.node]
        for other in beside:
            self._drop(other)
        self._decide(silent_for_long([member, *(other.member for other in beside if other.member)]), member.rank)

    def _compare_facts(self) -> None:
        """With those of rank 0, as soon as they are there."""
        expected = next((facts for member, facts in self._facts.items() if member.rank == 0), None)
        if expected is None:
            return
        for member, facts in self._facts.items():
            for name, value in expected.items():
                if facts.get(name) != value:
                    self._decide(differing(member, name, facts.get(name, ""), value), member.rank, mends=False)
        self._facts = {member: facts for member, facts in self._facts.items() if member.rank == 0}

    def _call_the_roll(self, limit_s: float) -> None:
        """Ask everybody where it stands."""
        if self._roll is None and self._verdict is None:
            self._roll, self._limit_s = {}, limit_s
            self._roll_until = time.monotonic() + ANSWER_S
            for guest in list(self._guests):
                if guest.member is not None:
                    self._tell(guest, {"report": True})

    def _judge(self) -> None:
        """Once all have answered, or had the time to."""
        if self._roll is None:
            return
        asked = [guest.member for guest in self._guests if guest.member is not None and not guest.parted]
        silent = [member.rank for member in asked if member.rank not in self._roll]
        if silent and time.monotonic() < self._roll_until:
            return
        found: Explanation | None = explain(self._roll, silent, limit_s=self._limit_s, name=partial(members, asked))
        self._roll = None
        if found is not None:
            self._decide(found.sentence, found.late[0], details=found.stacks)
            for guest in [guest for guest in self._guests if guest.member and guest.member.rank in silent]:
                self._drop(guest)  # nobody waits for it to know

    def _check_time(self) -> None:
        now = time.monotonic()
        self._judge()
        if self._rumour is not None and now > self._rumour[0]:
            _, member, sentence = self._rumour
            self._decide(sentence, member.rank, told_by=member)
        missing = sorted(set(range(self.world_size)) - self._arrived)
        if missing and now > self._arrival_until:
            late = f"{ranks(missing)} of {self.world_size} did not start within {ARRIVAL_S:.0f} s of rank 0"
            self._decide(f"{late}: the messages of their machines may say why", missing[0])

    def _decide(
        self,
        sentence: str,
        rank: int,
        *,
        details: str = "",
        told_by: Member | None = None,
        code: int = 1,
        mends: bool = True,
    ) -> None:
        """The first failure is the one that everybody hears of. One process speaks on each machine.

        Args:
            sentence: why the run ends.
            rank: whose failure it is.
            details: the stacks of ranks that hang.
            told_by: that rank, where it tells of it by itself.
            code: with which all ranks exit.
            mends: whether all may be well in another start.
        """
        if self._verdict is not None:
            return
        here = [guest.member for guest in self._guests if guest.member is not None and guest.member != told_by]
        speakers: dict[str, int] = {}
        for member in sorted(here, key=lambda member: member.rank):
            speakers.setdefault(member.node, member.rank)
        told_on = told_by.node if told_by else None
        self._verdict = {
            "sentence": sentence,
            "rank": rank,
            "details": details,
            "code": code,
            "mends": mends,
            "told_on": told_on,
            "speakers": sorted(speakers.values()),
        }
        self._farewell_until = time.monotonic() + FAREWELL_S
        for guest in list(self._guests):
            if guest.member is not None:
                self._tell(guest, self._verdict)

    def _tell(self, guest: _Guest, message: Mapping[str, Any]) -> None:
        try:
            send(guest.connection, message)
        except OSError:  # it hears of the end when its connection ends
            self._drop(guest)

    def _drop(self, guest: _Guest) -> None:
        if guest in self._guests:
            self._guests.remove(guest)
            self._selector.unregister(guest.connection)
            guest.connection.close()


class _Guest:
    """A connection to the hub."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.pending = b""
        self.member: Member | None = None  # once it has proved to be one
        self.parted = False  # has finished, or has said why it fails


# -- sentences ----------------------------------------------------------------------------------------------


def failed(member: Member, reason: str) -> str:
    """What a rank that fails says. Reasons that all ranks agree on name the rank themselves."""
    return reason if re.match(r"rank \d+ ", reason) else f"{member} failed: {reason}"


def differing(member: Member, name: str, value: str, expected: str) -> str:
    """What is said when ranks do not agree."""
    one, other = first_unlike_lines(value, expected)
    return f"{member} has {name} {one!r}, and rank 0 has {other!r}"


def first_unlike_lines(one: str, other: str) -> tuple[str, str]:
    """Of two texts that differ, the first lines that do; a text that is shorter lacks its line."""
    pairs = zip_longest(one.splitlines(), other.splitlines(), fillvalue="")
    return next(((mine.strip(), theirs.strip()) for mine, theirs in pairs if mine != theirs), (one, other))


def gone(member: Member) -> str:
    """What is said of a process that has ended."""
    return f"{member} is gone: its process ended without giving a reason (killed, perhaps for want of memory?)"


def silent_for_long(members: Iterable[Member]) -> str:
    """What is said of the processes of a machine that does not answer."""
    members = list(members)
    who = f"{ranks(member.rank for member in members)} of {members[0].world_size} on {members[0].host}"
    return f"no sign of life from {who} for {SILENCE_S:.0f} s: the machine or its network is gone"


def members(known: Iterable[Member], numbers: Sequence[int]) -> str:
    """ "rank 1 of 2 on hostA", "ranks 0, 4-7 of 8"; "the process" where there is one."""
    found = {member.rank: member for member in known}
    if found[numbers[0]].world_size == 1:
        return "the process"
    if len(numbers) == 1:
        return str(found[numbers[0]])
    return f"{ranks(numbers)} of {found[numbers[0]].world_size}"


def ranks(numbers: Iterable[int]) -> str:
    """ "rank 5", "ranks 0, 4-7"."""
    ordered = sorted(numbers)
    runs = []
    for _, run in groupby(enumerate(ordered), key=lambda item: item[1] - item[0]):
        first, *rest = [number for _, number in run]
        runs.append(f"{first}-{rest[-1]}" if rest else str(first))
    return f"rank{'s' if len(ordered) > 1 else ''} {', '.join(runs)}"


# -- the wire -----------------------------------------------------------------------------------------------


def connect(member: Member, store: Store, key: str) -> tuple[Member, socket.socket]:
    """Rank 0, and a connection to its hub. What stands in the store may be of an attempt that has ended.

    Raises:
        Fault: rank 0 did not come, or cannot be reached.
    """
    deadline = time.monotonic() + SILENCE_S
    while True:
        try:
            where = json.loads(store.get(key))
        except RuntimeError as error:
            raise Fault(f"{member} waited {ARRIVAL_S:.0f} s for rank 0, which did not start: {error}") from error
        try:
            connection = socket.create_connection((where["host"], where["port"]), timeout=SILENCE_S)
            notice_silence(connection)
            send(connection, {"token": where["token"], "member": asdict(member)})
            if next(messages(connection), None) is not None:
                connection.settimeout(None)
                return Member(**where["member"]), connection
        except OSError:
            pass
        if time.monotonic() > deadline:
            raise Fault(f"{member} cannot reach rank 0 at {where['host']}, port {where['port']}: it is gone")
        time.sleep(0.5)


def notice_silence(connection: socket.socket) -> None:
    """Let the kernel ask for signs of life, and end the connection after `SILENCE_S` without one (tcp(7))."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {
        "TCP_KEEPIDLE": SILENCE_S / 3,
        "TCP_KEEPALIVE": SILENCE_S / 3,  # the same on macOS
        "TCP_KEEPINTVL": 2,
        "TCP_KEEPCNT": SILENCE_S / 3,
        "TCP_USER_TIMEOUT": SILENCE_S * 1000,  # ms; for what is under way
    }
    for name, value in options.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), int(value))


def send(connection: socket.socket, message: Mapping[str, Any]) -> None:
    """One message."""
    connection.sendall(json.dumps(message).encode() + b"\n")


def messages(connection: socket.socket) -> Iterator[dict[str, Any]]:
    """Those that arrive. Read byte by byte, so that nothing is lost for the next who reads."""
    line = b""
    while received := connection.recv(1):
        line += received
        if received == b"\n":
            yield parse(line)
            line = b""


def parse(line: bytes) -> dict[str, Any]:
    """A message; empty when it is none."""
    try:
        message = json.loads(line)
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}


def _addresses(master: str) -> tuple[str, str]:
    """Where the others find this machine, and where to listen."""
    family, _, _, _, target = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # sends nothing
        own = str(probe.getsockname()[0])
    if master in ("localhost", own) or not (own.startswith("127.") or own == "::1"):
        return own, own
    return master, ""  # the name of this machine, which only here means the loopback
