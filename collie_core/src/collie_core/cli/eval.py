"""`collie eval run.yaml`: the configured evaluators over `data.eval`, without training."""

from __future__ import annotations

import argparse
import json

from collie_core.cli._config import add_config_arguments, load_config
from collie_core.errors import RunError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The config file, its overrides, and another model."""
    add_config_arguments(parser)
    parser.add_argument(
        "--model", metavar="DIR", help="evaluate this model instead of the config's, e.g. runs/demo/model"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def run(args: argparse.Namespace) -> int:
    """Print the results."""
    if args.model:
        # Sections are replaced whole: tokenizer, architecture and adapter are those of the folder.
        model = f"model={{model_name_or_path: {json.dumps(args.model)}}}"
        args.overrides += [model, "tokenizer={type: pretrained}", "adapter=null"]
    config = load_config(args)
    if not config.data.eval:
        raise RunError("data.eval is empty: nothing to evaluate; set data.eval to a file or a split")
    from collie_core.cli._quiet import quiet_libraries
    from collie_core.loop import Trainer

    quiet_libraries()
    results = Trainer(config, observers=()).evaluate()
    if args.json:
        print(json.dumps(results))
    else:
        width = max(map(len, results))
        print("\n".join(f"{name:<{width}}  {value:.6g}" for name, value in results.items()))
    return 0
