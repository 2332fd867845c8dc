"""A small random model, and servers of it on free ports."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import pytest

sys.path.append(str(Path(__file__).parent / "support"))  # --import-mode=importlib adds no folder by itself

from serving_here import Running, serving
from small_models import letters, tiny


class Model(NamedTuple):
    model: Any
    tokenizer: Any


@pytest.fixture(scope="session")
def small() -> Model:
    tokenizer = letters()
    return Model(tiny(tokenizer), tokenizer)


@pytest.fixture(scope="session")
def folder(small: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small")
    small.model.save_pretrained(path)
    small.tokenizer.save_pretrained(path)
    return path


Serve = Callable[..., Running]


@pytest.fixture(name="serve")
def serve_(small: Model) -> Iterator[Serve]:
    """Start a server with options of its own."""
    from contextlib import ExitStack

    with ExitStack() as stack:

        def start(model: Any = small.model, tokenizer: Any = small.tokenizer, **options: Any) -> Running:
            return stack.enter_context(serving(model, tokenizer, **options))

        yield start


@pytest.fixture(scope="session")
def running(small: Model) -> Iterator[Running]:
    """A server for every test that needs no other."""
    with serving(small.model, small.tokenizer, model_name="small") as one:
        yield one


@pytest.fixture
def client(running: Running) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=running.url, timeout=60, trust_env=False) as one:
        yield one
