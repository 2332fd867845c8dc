"""`collie train run.yaml`: fine-tune or pre-train, on every GPU of this machine."""

from __future__ import annotations

import argparse

from collie_core.cli._config import add_config_arguments, add_nproc_argument, load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The config file and its overrides."""
    add_config_arguments(parser)
    add_nproc_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Train as the file says; the config is checked before torch is imported, but by a launched process."""
    from collie_core import launch

    with launch.reported_to_launcher() as agree:
        config = load_config(args, complete=True)
        processes = launch.processes_to_start(args.nproc, config.parallel)
        if processes > 1:
            return launch.start(processes, ["train", args.config, *args.overrides])
        from collie_core.cli._quiet import quiet_libraries
        from collie_core.loop import Trainer
        from collie_core.report import run_identity

        agree(run_identity(config))
        quiet_libraries()
        Trainer(config).train()
    return 0
