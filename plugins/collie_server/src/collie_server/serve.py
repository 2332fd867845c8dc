"""Serve a model over HTTP: chat and completions as OpenAI's clients ask for them, and a page to chat on."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collie_server.http_config import HttpConfig
    from collie_server.server import HttpServer

OPTIONS = {
    "host": str,
    "port": int,
    "token": str,
    "model_name": str,
    "max_batch_size": int,
    "max_queue": int,
    "max_prompt_tokens": int,
    "max_new_tokens": int,
    "max_body_bytes": int,
    "timeout": float,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, and an option for each field of the configuration."""
    from collie_server.http_config import HttpConfig

    parser.add_argument("model", metavar="DIR", help="a model folder, an adapter folder, or a hub id")
    for name, kind in OPTIONS.items():
        field = HttpConfig.model_fields[name]
        default = "" if field.default is None or name == "model_name" else f" (default: {field.default})"
        described = (
            "What clients call the model; default: the folder's name." if name == "model_name" else field.description
        )
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="X", help=f"{described}{default}")
    parser.add_argument("--verbose", action="store_true", help="log a line for each request, without its text")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that the folder brings")


def run(args: argparse.Namespace) -> int:
    """Load the model and serve it until a signal comes."""
    config = _config(args)
    if args.verbose:
        import logging

        logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
        logging.getLogger("collie.server").setLevel(logging.INFO)
    print(f"loading {args.model}", file=sys.stderr, flush=True)
    model, tokenizer = load(args.model, trust_remote_code=args.trust_remote_code)
    server = build(config)

    def ready(port: int) -> None:
        host = f"[{config.host}]" if ":" in config.host else config.host
        print(f"serving {config.model_name} on http://{host}:{port}", flush=True)
        if server.token is not None and config.token is None:
            print(f"token: {server.token}", flush=True)

    with _stopped_by_signals(server):
        server.serve(model, tokenizer, config, ready)
    return 0


def load(folder: str, *, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Model and tokenizer, without the progress bars of libraries."""
    from collie_core.api import load_for_generation, quiet_libraries

    quiet_libraries()
    return load_for_generation(folder, trust_remote_code=trust_remote_code)


def build(config: HttpConfig) -> HttpServer:
    """The server of a configuration."""
    from collie_server.server import HttpServer

    return HttpServer(**config.model_dump(exclude={"type"}))


def _config(args: argparse.Namespace) -> HttpConfig:
    from pydantic import ValidationError

    from collie_core.api import ConfigError, Problem
    from collie_server.http_config import HttpConfig

    given = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    if os.environ.get("COLLIE_TOKEN"):
        given.setdefault("token", os.environ["COLLIE_TOKEN"])
    given.setdefault("model_name", Path(args.model).resolve().name if Path(args.model).exists() else args.model)
    try:
        return HttpConfig(**given)
    except ValidationError as error:
        problems = [
            Problem(f"--{str(one['loc'][0]).replace('_', '-')}", one["msg"], one["input"]) for one in error.errors()
        ]
        raise ConfigError(problems) from None


@contextmanager
def _stopped_by_signals(server: HttpServer) -> Iterator[None]:
    """SIGINT and SIGTERM stop the server, and nothing else."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: server.stop()) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
