"""`collie eval run.yaml`: the configured evaluators, without training."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping

from collie_core.cli._config import add_config_arguments, add_nproc_argument, load_config
from collie_core.errors import RunError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The config file, its overrides, and another model."""
    add_config_arguments(parser)
    parser.add_argument(
        "--model", metavar="DIR", help="evaluate this model instead of the config's, e.g. runs/demo/model"
    )
    add_nproc_argument(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def run(args: argparse.Namespace) -> int:
    """Print the results."""
    from collie_core import launch, starter

    if args.model:
        # Sections are replaced whole: tokenizer, architecture and adapter are those of the folder.
        model = f"model={{model_name_or_path: {json.dumps(args.model)}}}"
        args.overrides += [model, "tokenizer={type: pretrained}", "adapter=null"]
    with launch.reported_to_launcher() as agree:
        config = load_config(args)
        if not config.data.eval and not any(evaluator.data for evaluator in config.evaluation.evaluators):
            raise RunError("data.eval is empty: nothing to evaluate; set data.eval to a file or a split")
        processes = launch.processes_to_start(args.nproc, config.parallel)
        if processes > 1:
            return starter.start(processes, ["eval", args.config, *["--json"] * args.json, *args.overrides])
        from collie_core.cli._quiet import quiet_libraries
        from collie_core.loop import Trainer
        from collie_core.report import run_identity

        agree(run_identity(config))
        quiet_libraries()
        trainer = Trainer(config, observers=())
        results = trainer.evaluate()
        if trainer.topology.is_main:
            _show(results, trainer.details, as_json=args.json)
    return 0


def _show(results: Mapping[str, float], details: Mapping[str, str], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({**results, "details": dict(details)} if details else results))
    else:
        width = max(map(len, results))
        print("\n".join(f"{name:<{width}}  {value:.6g}" for name, value in results.items()))
        for name, text in details.items():
            print(f"{name}: {text}")
