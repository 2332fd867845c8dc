"""Ranks that end together: several ends of the watch in this process, a lost process played by a closed socket."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from collie_core import hub, watch
from collie_core.errors import DataError, RunError
from collie_core.hub import Member, ranks
from collie_core.topology import Topology
from collie_core.watch import Ending, Watch

AT_ONCE = 2.0  # seconds


class MemoryStore:
    """A key-value store within this process."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.changed = threading.Condition()

    def set(self, key: str, value: str) -> None:
        with self.changed:
            self.values[key] = value
            self.changed.notify_all()

    def get(self, key: str) -> bytes:
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, timeout=5):
                raise RuntimeError("wait timeout")
            return self.values[key].encode()

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        with self.changed:
            if self.values.get(key, "") == expected:
                self.values[key] = desired
            return self.values[key].encode()

    def check(self, keys: list[str]) -> bool:
        with self.changed:
            return all(key in self.values for key in keys)


class Rank:
    """One end, and what it was told."""

    def __init__(self, number: int, world_size: int, store: MemoryStore, per_host: int) -> None:
        node = number // per_host
        member = Member(number, world_size, number % per_host, f"host{node}", str(node))
        self.told: list[Ending] = []
        self.heard = threading.Event()
        self.watch = Watch(member, store, "key", self._on_end, master="127.0.0.1")

    def _on_end(self, _: Watch, ending: Ending) -> None:
        self.told.append(ending)
        self.heard.set()

    def heard_within(self, seconds: float) -> Ending:
        assert self.heard.wait(seconds), "was told nothing"
        return self.told[0]

    def die(self) -> None:
        """As the kernel does it for a killed process; the thread of rank 0 lives on here."""
        with self.watch._lock:
            self.watch._left = True
        watch._shut(self.watch._connection)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[Rank]]]:
    """Starts so many ranks, two on each host."""
    monkeypatch.setattr(hub, "WITNESS_S", 0.5)
    monkeypatch.setattr(hub, "FAREWELL_S", 1.0)
    started: list[Rank] = []

    def start(world_size: int, *, arriving: int | None = None, per_host: int = 2) -> list[Rank]:
        store = MemoryStore()
        started.extend(Rank(number, world_size, store, per_host) for number in range(arriving or world_size))
        return started

    yield start
    for rank in started[1:]:
        rank.die()
    if started:
        started[0].watch.fail("the test is over")


def test_a_failure_reaches_all_and_one_on_each_host_speaks(run: Callable[..., list[Rank]]) -> None:
    everyone = run(6)
    own = everyone[3].watch.fail("no such file: /data/train.jsonl")
    assert own.sentence == "rank 3 of 6 on host1 failed: no such file: /data/train.jsonl"
    told = {rank.watch.member.rank: rank.heard_within(AT_ONCE) for rank in everyone if rank is not everyone[3]}
    assert {ending.sentence for ending in told.values()} == {own.sentence}
    assert {ending.rank for ending in told.values()} == {3}
    assert [number for number, ending in told.items() if ending.speaks] == [0, 2, 4]  # one on each host
    assert [number for number, ending in told.items() if ending.beside] == [2]  # rank 3 can do it here


def test_rank_0_tells_of_its_own_failure(run: Callable[..., list[Rank]]) -> None:
    everyone = run(4)
    failing = threading.Thread(target=everyone[0].watch.fail, args=("out of order",))
    failing.start()
    assert [rank.heard_within(AT_ONCE).sentence for rank in everyone[1:]] == [
        "rank 0 of 4 on host0 failed: out of order"
    ] * 3
    failing.join(AT_ONCE)
    assert not failing.is_alive()


def test_a_process_that_just_ends_is_noticed_at_once(run: Callable[..., list[Rank]]) -> None:
    everyone = run(4)
    everyone[3].die()
    said = everyone[0].heard_within(AT_ONCE)
    assert said.sentence.startswith("rank 3 of 4 on host1 is gone: its process ended without giving a reason")
    assert everyone[2].heard_within(AT_ONCE).speaks


def test_what_happened_to_the_partner_explains_more_than_its_loss(run: Callable[..., list[Rank]]) -> None:
    everyone = run(3)
    lonely: list[Ending] = []
    witness = threading.Thread(
        target=lambda: lonely.append(everyone[1].watch.fail("Connection closed by peer", witness=True))
    )
    witness.start()
    time.sleep(0.1)
    everyone[2].die()
    witness.join(AT_ONCE)
    assert [ending.rank for ending in lonely] == [2]
    assert not lonely[0].speaks  # rank 0 does
    assert everyone[0].heard_within(AT_ONCE).rank == 2


def test_a_lost_partner_alone_is_told_after_a_while(run: Callable[..., list[Rank]]) -> None:
    everyone = run(2)
    assert everyone[1].watch.fail("Timed out", witness=True).rank == 1
    assert everyone[0].heard_within(AT_ONCE).sentence == "rank 1 of 2 on host0 failed: Timed out"


def test_a_reason_that_names_a_rank_is_told_as_it_is(run: Callable[..., list[Rank]]) -> None:
    everyone = run(2)
    everyone[1].watch.fail("rank 1 has torch '2.12', and rank 0 has '2.13'")
    assert everyone[0].heard_within(AT_ONCE).sentence == "rank 1 has torch '2.12', and rank 0 has '2.13'"


def test_the_loss_of_rank_0_is_noticed_by_all(run: Callable[..., list[Rank]]) -> None:
    everyone = run(4)
    everyone[0].die()
    thread = everyone[0].watch._hub
    assert thread is not None
    thread._finished = set(range(4))  # it closes all connections without a word
    told = [rank.heard_within(AT_ONCE) for rank in everyone[1:]]
    assert all(ending.sentence.startswith("rank 0 of 4 on host0 is gone") for ending in told)
    assert [ending.speaks for ending in told] == [True, True, False]  # rank 1 beside it, rank 2 on the other host


def test_a_silent_machine_is_named_with_all_its_ranks(run: Callable[..., list[Rank]]) -> None:
    everyone = run(6)
    thread = everyone[0].watch._hub
    assert thread is not None
    lost = next(guest for guest in thread._guests if guest.member and guest.member.rank == 3)
    thread._lost(lost, silent=True)
    said = everyone[0].heard_within(AT_ONCE).sentence
    assert said == "no sign of life from ranks 2-3 of 6 on host1 for 15 s: the machine or its network is gone"
    assert everyone[4].heard_within(AT_ONCE).speaks


def test_the_end_of_the_work_is_no_failure(run: Callable[..., list[Rank]]) -> None:
    everyone = run(3)
    everyone[1].watch.leave()
    leaving = threading.Thread(target=everyone[0].watch.leave)
    leaving.start()
    time.sleep(0.3)
    assert leaving.is_alive()  # rank 0 stays for the last
    everyone[2].watch.leave()
    leaving.join(AT_ONCE)
    assert not leaving.is_alive()
    assert not any(rank.told for rank in everyone)


def test_ranks_that_do_not_agree_are_ended_with_what_differs(run: Callable[..., list[Rank]]) -> None:
    everyone = run(4)
    text = "model:\n  dtype: auto\noptimizer:\n  lr: {}\n"
    for rank in (everyone[3], everyone[1], everyone[0]):  # in whatever order
        assert not rank.told
        lr = 0.01 if rank is everyone[3] else 0.001
        rank.watch.agree({"torch": "2.13.0", "the configuration": text.format(lr)})
    told = [rank.heard_within(AT_ONCE) for rank in everyone]
    assert {ending.sentence for ending in told} == {
        "rank 3 of 4 on host1 has the configuration 'lr: 0.01', and rank 0 has 'lr: 0.001'"
    }
    assert [ending.speaks for ending in told] == [True, False, True, False]


def test_one_that_was_asked_to_leave_takes_all_along(run: Callable[..., list[Rank]]) -> None:
    everyone = run(3)
    assert everyone[1].watch.fail("SIGTERM came", code=0, mends=False).sentence == "SIGTERM came"
    for rank in (everyone[0], everyone[2]):
        ending = rank.heard_within(AT_ONCE)
        assert (ending.sentence, ending.code, ending.mends) == ("SIGTERM came", 0, False)


def stand(place: threading.Event) -> None:
    place.wait(5)


def test_a_rank_for_which_the_others_wait_is_found(run: Callable[..., list[Rank]]) -> None:
    everyone = run(3)
    place = threading.Event()
    for rank in everyone:
        rank.watch.limit(0.3)
        if rank is not everyone[2]:  # the last one is this thread: it goes on, and is not where the others wait
            thread = threading.Thread(target=stand, args=(place,), daemon=True)
            thread.start()
            rank.watch.progress.thread = thread.ident or 0
            rank.watch.progress.run = SimpleNamespace(step=3)
    told = [everyone[0].heard_within(5), everyone[1].heard_within(AT_ONCE)]
    place.set()
    assert {ending.rank for ending in told} == {2}
    assert told[0].sentence.startswith("rank 2 of 3 on host1 is late: outside of the steps, in")
    assert "ranks 0-1 of 3 stand still after step 3, in" in told[0].sentence
    assert "stand\n" in told[0].details
    assert told[0].mends


def test_a_rank_0_that_does_not_answer_is_found(
    run: Callable[..., list[Rank]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "ANSWER_S", 0.2)
    everyone = run(2)
    monkeypatch.setattr(everyone[0].watch._hub, "_hear", lambda *_: None)  # stopped
    everyone[1].watch.progress.run = SimpleNamespace(step=3)
    everyone[1].watch.limit(0.3)
    for _ in range(20):
        time.sleep(0.1)  # this thread is the one that is looked at
    ending = everyone[1].heard_within(AT_ONCE)
    assert (ending.rank, ending.speaks) == (0, True)
    assert ending.sentence.startswith("rank 0 of 2 on host0 is late: no answer, so stopped or blocked. rank 1 of 2 on")


def test_the_first_that_comes_decides_for_all(run: Callable[..., list[Rank]], monkeypatch: pytest.MonkeyPatch) -> None:
    everyone = run(2)

    def agreed(rank: int, question: str, *, wish: bool) -> bool:
        monkeypatch.setattr(watch, "_current", everyone[rank].watch)
        return watch.agreed(question, wish=wish)

    assert not agreed(0, "leave/4/1", wish=False)
    assert not agreed(1, "leave/4/1", wish=True)  # the other one has gone on already
    assert agreed(0, "leave/4/2", wish=False)  # and now knows of the wish
    assert agreed(1, "leave/4/2", wish=True)
    assert not agreed(0, "other/1", wish=False)


def test_ranks_that_agree_go_on(run: Callable[..., list[Rank]]) -> None:
    everyone = run(3)
    for rank in everyone:
        rank.watch.agree({"torch": "2.13.0"})
    time.sleep(0.2)
    assert not any(rank.told for rank in everyone)


def test_one_that_comes_late_is_told(run: Callable[..., list[Rank]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "FAREWELL_S", 5.0)
    store = MemoryStore()
    first = Rank(0, 2, store, 1)
    failing = threading.Thread(target=first.watch.fail, args=("run.yaml: no such file",))
    failing.start()
    time.sleep(0.2)
    late = Rank(1, 2, store, 1)
    assert late.heard_within(AT_ONCE).sentence == "rank 0 of 2 on host0 failed: run.yaml: no such file"
    failing.join(5)


def test_those_that_never_come_are_named(monkeypatch: pytest.MonkeyPatch, run: Callable[..., list[Rank]]) -> None:
    monkeypatch.setattr(hub, "ARRIVAL_S", 0.5)
    everyone = run(6, arriving=3)
    assert everyone[0].heard_within(3).sentence.startswith("ranks 3-5 of 6 did not start within 0 s of rank 0")


def test_rank_0_that_never_comes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "SILENCE_S", 1.0)
    store = MemoryStore()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    where = {"host": "127.0.0.1", "port": port, "token": "", "member": {}}
    store.set("key", json.dumps(where))  # of an attempt that has ended
    with pytest.raises(RunError, match=f"rank 1 of 2 on host1 cannot reach rank 0 at 127.0.0.1, port {port}"):
        Rank(1, 2, store, 1)


def test_strangers_are_not_heard(run: Callable[..., list[Rank]]) -> None:
    everyone = run(2)
    thread = everyone[0].watch._hub
    assert thread is not None
    address = thread._server.getsockname()
    for said in (b"GET / HTTP/1.1\r\n\r\n", b'{"token": "guess", "member": {}}\n', b"[1]\n{}\n", b"\xff\xfe\n"):
        with socket.create_connection(address) as stranger:
            stranger.sendall(said + b'{"failed": "nonsense", "witness": false, "code": 1, "mends": true}\n')
            stranger.settimeout(0.2)
            with pytest.raises((TimeoutError, ConnectionError)):
                stranger.recv(1)
    assert not any(rank.told for rank in everyone)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")  # the child runs no library
def test_a_fork_lets_go_of_the_connections(run: Callable[..., list[Rank]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A data loader's worker that outlives its rank must not hide the death of it."""
    everyone = run(2)
    monkeypatch.setattr(watch, "_current", everyone[0].watch)
    pid = os.fork()
    if pid == 0:
        watch._forget()
        thread = everyone[0].watch._hub
        assert thread is not None
        ends = [everyone[0].watch._connection, thread._server, *(guest.connection for guest in thread._guests)]
        os._exit(sum(end.fileno() != -1 for end in ends))
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    everyone[1].watch.fail("and the parent goes on")
    assert everyone[0].heard_within(AT_ONCE).rank == 1


def test_ranks_are_written_in_ranges() -> None:
    assert ranks([5]) == "rank 5"
    assert ranks([0, 4, 5, 6, 7]) == "ranks 0, 4-7"


def test_reasons_and_witnesses() -> None:
    import torch.distributed as dist

    assert watch.reason_of(DataError("rows.jsonl:3: this is not JSON")) == "rows.jsonl:3: this is not JSON"
    assert watch.reason_of(ZeroDivisionError("a bug")) == "ZeroDivisionError: a bug"
    assert watch.reason_of(MemoryError()) == "MemoryError"
    assert watch.is_witness(dist.DistBackendError("NCCL error"))
    assert watch.is_witness(
        RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed")
    )
    assert not watch.is_witness(RuntimeError("CUDA out of memory"))


def test_a_reason_is_left_for_the_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    watch.leave_reason("nobody asked")
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    watch.leave_reason("rank 1 of 2 on host1 failed: x")
    written: dict[str, Any] = json.loads(file.read_text())["message"]
    assert written["message"] == written["extraInfo"]["py_callstack"] == "rank 1 of 2 on host1 failed: x"


@pytest.mark.parametrize("variables", [{}, {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1"}])
def test_a_program_that_no_launcher_started_is_left_alone(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    threads = threading.active_count()
    with watch.watching(Topology(world_size=2), 1800.0):
        assert threading.active_count() == threads
