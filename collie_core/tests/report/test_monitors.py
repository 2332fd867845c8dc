"""Numbers of the machine."""

from __future__ import annotations

import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import psutil
import pytest
from fake_runs import make_run, tell

from collie_core.report.monitors import MachineMonitor

Disk = namedtuple("Disk", "read_bytes write_bytes")
Network = namedtuple("Network", "bytes_sent bytes_recv")
Times = namedtuple("Times", "user system idle iowait guest")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Counters that a test moves, and a clock."""
    state: dict[str, Any] = {
        "now": 0.0,
        "disk": Disk(1000, 5000),
        "network": Network(0, 0),
        "times": Times(10.0, 10.0, 10.0, 10.0, 5.0),
    }
    monkeypatch.setattr(time, "perf_counter", lambda: state["now"])
    monkeypatch.setattr(psutil, "disk_io_counters", lambda: state["disk"])
    monkeypatch.setattr(psutil, "net_io_counters", lambda: state["network"])
    monkeypatch.setattr(psutil, "cpu_times", lambda: state["times"])
    return state


def test_rates_are_those_since_the_last_logged_step(machine: dict[str, Any], tmp_path: Path) -> None:
    run, monitor = make_run(tmp_path), MachineMonitor(["host", "disk", "network"])
    tell([monitor], "collie_run_start", run=run)
    for step in (1, 2):
        machine |= {"now": 2.0 * step, "disk": Disk(1000 + 600 * step, 5000), "network": Network(40 * step, 8 * step)}
        machine["times"] = Times(10.0 + 2 * step, 10.0 + step, 10.0 + step, 10.0, 5.0 + step)
        tell([monitor], "collie_after_step", run=run, loss=None)
    memory = run.metrics.pop("host/memory_bytes")
    assert memory > 2**20
    assert run.metrics == {
        "host/cpu_percent": 75.0,  # guests are part of user already: 6 of 8 seconds
        "disk/read_bytes_per_second": 300.0,
        "disk/write_bytes_per_second": 0.0,
        "network/sent_bytes_per_second": 20.0,
        "network/received_bytes_per_second": 4.0,
    }
    tell([monitor], "collie_metrics", run=run, values={})
    machine |= {"now": 5.0, "network": Network(180, 16)}
    tell([monitor], "collie_after_step", run=run, loss=None)
    assert run.metrics["network/sent_bytes_per_second"] == 100.0
    assert run.metrics["disk/read_bytes_per_second"] == 0.0


def test_only_what_is_asked_for_and_what_the_machine_has(machine: dict[str, Any], tmp_path: Path) -> None:
    run, monitor = make_run(tmp_path), MachineMonitor(["disk"])
    machine |= {"disk": None, "now": 1.0}
    tell([monitor], "collie_run_start", run=run)
    machine["now"] = 2.0
    tell([monitor], "collie_after_step", run=run, loss=None)
    assert run.metrics == {}


def test_a_real_machine(tmp_path: Path) -> None:
    run, monitor = make_run(tmp_path), MachineMonitor(["host", "disk", "network"])
    tell([monitor], "collie_run_start", run=run)
    sum(number * number for number in range(300_000))
    tell([monitor], "collie_after_step", run=run, loss=None)
    assert 0 <= run.metrics["host/cpu_percent"] <= 100
    assert all(value >= 0 for value in run.metrics.values())
