"""The numbers between two logged steps."""

from __future__ import annotations

import time

import pytest
import torch

from collie_core.report.meter import Meter
from collie_core.topology import Topology


def test_it_counts_since_the_last_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    meter = Meter(Topology(world_size=4))  # ranks that share one copy of the model, and so one batch
    for loss in (3.0, 2.0):
        meter.add(torch.tensor(loss), 600)
    now = 102.0
    values = meter.read()
    assert values.pop("peak_memory_bytes") > 2**20
    assert values == {
        "loss": 2.5,
        "tokens": 1200,
        "tokens_per_second": 600.0,
        "tokens_per_second_per_device": 150.0,
        "step_time_s": 1.0,
    }
    now = 110.0
    meter.restart()  # as after an evaluation, whose time does not count
    meter.add(torch.tensor(1.0), 100)
    now = 110.5
    values = meter.read()
    assert (values["tokens"], values["tokens_per_second"], values["loss"]) == (1300, 200.0, 1.0)
