"""Serve a model over HTTP: chat and completions as OpenAI's clients ask for them, and a page to chat on."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collie_core.api import ParallelConfig
    from collie_server.http_config import HttpConfig
    from collie_server.server import HttpServer

OPTIONS = {
    "compare": str,
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

OTHERWISE = {  # than beside a run
    "model_name": "What clients call the model; default: the folder's name.",
    "compare": "A second model to ask, as DIR; clients call it compare.",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, and an option for each field of the configuration."""
    from collie_server.http_config import HttpConfig

    parser.add_argument(
        "model", metavar="DIR", help="the folder of a model, an adapter, a checkpoint or a run, or a hub id"
    )
    parser.add_argument("--nproc", type=int, metavar="N", help="processes to start; default: as many as share it")
    for name, kind in OPTIONS.items():
        field = HttpConfig.model_fields[name]
        default = "" if field.default is None or name == "model_name" else f" (default: {field.default})"
        described = OTHERWISE.get(name, field.description)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="X", help=f"{described}{default}")
    parser.add_argument("--verbose", action="store_true", help="log a line for each request, without its text")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that the folder brings")
    parser.epilog = "How processes share the model stands behind: --nproc 2 parallel.tensor_parallel_size=2"
    parse = parser.parse_known_args

    def parse_with_parallel(
        args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        known, rest = parse(args, namespace)
        known.parallel = [word for word in rest if word.startswith("parallel.")]
        return known, [word for word in rest if word not in known.parallel]

    parser.parse_known_args = parse_with_parallel  # type: ignore[method-assign, assignment]


def run(args: argparse.Namespace) -> int:
    """Load the model and serve it until a signal comes."""
    config, parallel = _config(args), _parallel(args)
    if args.verbose:
        import logging

        logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
        logging.getLogger("collie.server").setLevel(logging.INFO)
    from collie_core.api import on_ranks

    return on_ranks(args.nproc, parallel, _again(args), lambda: _serve(args, config, parallel))


def _serve(args: argparse.Namespace, config: HttpConfig, parallel: ParallelConfig) -> int:
    from collie_core.api import Topology, serve

    topology = Topology.start(parallel)
    if topology.is_main:
        print(f"loading {args.model}", file=sys.stderr, flush=True)
    trust = {"trust_remote_code": args.trust_remote_code}
    model, tokenizer = load(args.model, topology=topology, parallel=parallel, **trust)
    compare = load(config.compare, **trust) if config.compare is not None and topology.is_main else None
    with _stopped_by_signals() as stop:
        serve(
            build(config),
            model,
            tokenizer,
            compare=compare,
            names=(args.model, config.compare or ""),
            slots=config.max_batch_size,
            queue=config.max_queue,
            topology=topology,
            ready=lambda where: print(f"serving {config.model_name} on {where}", flush=True),
            stop=stop,
        )
    return 0


def load(folder: str, **options: Any) -> tuple[Any, Any]:
    """Model and tokenizer, also of a folder of a run or a checkpoint, without the progress bars of libraries."""
    from collie_core.api import load_for_generation, model_folder, quiet_libraries

    quiet_libraries()
    return load_for_generation(model_folder(folder), **options)


def build(config: HttpConfig) -> HttpServer:
    """The server of a configuration."""
    from collie_server.server import HttpServer

    return HttpServer(**config.model_dump(exclude=set(config.for_the_core)))


def _config(args: argparse.Namespace) -> HttpConfig:
    from pydantic import ValidationError

    from collie_core.api import ConfigError, Problem
    from collie_server.http_config import HttpConfig

    given = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    given.setdefault("model_name", Path(args.model).resolve().name if Path(args.model).exists() else args.model)
    try:
        return HttpConfig(**given)
    except ValidationError as error:
        problems = [
            Problem(f"--{str(one['loc'][0]).replace('_', '-')}", one["msg"], one["input"]) for one in error.errors()
        ]
        raise ConfigError(problems) from None


def _again(args: argparse.Namespace) -> list[str]:
    """The command line, for another process."""
    options = [f"--{name.replace('_', '-')}={value}" for name in OPTIONS if (value := getattr(args, name)) is not None]
    flags = [f"--{name.replace('_', '-')}" for name in ("verbose", "trust_remote_code") if getattr(args, name)]
    return ["serve", args.model, *args.parallel, *options, *flags]


def _parallel(args: argparse.Namespace) -> ParallelConfig:
    """How ranks share the model, from words such as parallel.tensor_parallel_size=2."""
    from collie_core.api import RunConfig

    return RunConfig.from_text("{}", args.parallel, name="the command line").parallel


@contextmanager
def _stopped_by_signals() -> Iterator[threading.Event]:
    """SIGINT and SIGTERM set the event, and do nothing else."""
    stop = threading.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: stop.set()) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
