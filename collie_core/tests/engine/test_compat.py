"""The bends of compat.py: that they bend, that they straighten, and that they are still needed."""

from __future__ import annotations

import logging
import os
from importlib import import_module
from typing import Any

import pytest

from collie_core.compat import deepspeed_start

deepspeed = pytest.importorskip("deepspeed", reason="DeepSpeed is an extra of collie-core and is not installed")


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of operators that DeepSpeed would compile now."""
    accelerator: Any = import_module("deepspeed.accelerator").get_accelerator()
    asked: list[str] = []

    class Builder:
        NAME = "deepspeed_shm_comm"

        def load(self) -> None:
            asked.append(self.NAME)

        def absolute_name(self) -> str:
            return self.NAME

    monkeypatch.setattr(accelerator, "create_op_builder", lambda name: Builder())
    monkeypatch.setattr(deepspeed.ops, "__compatible_ops__", {Builder.NAME: True}, raising=False)
    return asked


def test_nothing_is_compiled_inside_and_all_is_as_before_outside(
    builds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    build = import_module("deepspeed.comm.torch").build_shm_op
    level = logging.getLogger("DeepSpeed").level
    with deepspeed_start(3):
        build()
        assert builds == []
        assert os.environ["LOCAL_RANK"] == "3"
    assert deepspeed.ops.__compatible_ops__ == {"deepspeed_shm_comm": True}
    assert logging.getLogger("DeepSpeed").level == level


def test_the_bend_is_still_needed(builds: list[str]) -> None:
    """When this fails, DeepSpeed no longer compiles at its start: remove the bend."""
    import_module("deepspeed.comm.torch").build_shm_op()
    assert builds == ["deepspeed_shm_comm"]


def test_a_changed_target_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("deepspeed.comm.torch"), "build_shm_op", lambda: None)
    with pytest.raises(RuntimeError, match="compat needs an update"), deepspeed_start(0):
        pass
