"""`collie validate run.yaml`: everything that is wrong with a configuration, without running it."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from collie_core.cli._config import add_config_arguments, load_config
from collie_core.errors import MISSING, ConfigError, PluginError, Problem

if TYPE_CHECKING:
    from collie_core.config.run import RunConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The config file, its overrides, and the form of the answer."""
    add_config_arguments(parser)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object: ok, problems, and what was resolved"
    )


def run(args: argparse.Namespace) -> int:
    """One line when all is well, the problems otherwise."""
    try:
        config = load_config(args, complete=True)
    except ConfigError as error:
        if not args.json:
            raise
        _print({"ok": False, "problems": [_as_object(problem) for problem in error.problems]})
        return 2
    if args.json:
        _print({"ok": True, "problems": [], "plugins": _plugins(config), "batch": _batch(config)})
    else:
        print(f"{args.config}: ok; {', '.join(_plugins(config))}; {_batch(config)}")
    return 0


def _print(answer: dict[str, Any]) -> None:
    print(json.dumps(answer, indent=2))


def _as_object(problem: Problem) -> dict[str, Any]:
    file, _, line = problem.origin.rpartition(":")
    located = {"file": file, "line": int(line)} if line.isdigit() else {"file": problem.origin, "line": None}
    written = {} if problem.value is MISSING else {"value": _as_json(problem.value)}
    return {**located, "key": problem.key, **written, "rule": problem.rule, "hint": problem.hint.strip()}


def _as_json(value: object) -> object:
    """What a JSON reader takes: NaN and infinity, which are among the mistakes, become text."""
    return json.loads(json.dumps(value, default=str), parse_constant=str)


def _plugins(config: RunConfig) -> list[str]:
    """Each plugin that the configuration names, with the distribution it comes from."""
    named = [("optimizer", config.optimizer.type)]
    named += [("adapter", config.adapter.type)] if config.adapter else []
    for evaluator in config.evaluation.evaluators:
        named += [("evaluator", evaluator.type), *(("metric", metric.type) for metric in evaluator.metrics)]
    origins = [_origin(config, kind, name) for kind, name in named]
    return [_model(config), *origins]


def _origin(config: RunConfig, kind: str, name: str) -> str:
    entry = config.registry.find(kind, name)
    return f"{kind} {entry.name} ({entry.distribution} {entry.version})"


def _model(config: RunConfig) -> str:
    if config.model.config is None:
        return f"model {config.model.model_name_or_path}"
    family = str(config.model.config["model_type"])
    try:
        return _origin(config, "model", family)
    except PluginError:  # a family without a plugin is transformers' own
        return f"model {family} (transformers)"


def _batch(config: RunConfig) -> str:
    """The arithmetic of the global batch, for one process where the number of them is not written."""
    size = config.parallel.data_parallel_size
    try:
        return str(config.batch_sizes(1 if size == "auto" else size))
    except ConfigError:  # only with `auto`: a fixed size that does not fit is refused above
        return f"{config.train.global_batch_size} samples per step, on more than one process"
