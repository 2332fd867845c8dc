"""`collie train run.yaml`: fine-tune or pre-train, on every GPU of this machine."""

from __future__ import annotations

import argparse

from collie_core.cli._config import add_config_arguments, load_config
from collie_core.errors import RunError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The config file and its overrides."""
    add_config_arguments(parser)
    parser.add_argument(
        "--nproc", type=int, metavar="N", help="processes to start on this machine (default: one per GPU, else one)"
    )


def run(args: argparse.Namespace) -> int:
    """Train as the file says; the config is checked before torch is imported, but by a launched process."""
    from collie_core import launch

    if args.nproc is not None and args.nproc < 1:
        raise RunError(f"--nproc {args.nproc}: must be at least 1")
    with launch.reported_to_launcher() as agree:
        config = load_config(args, complete=True)
        processes = launch.processes_to_start(args.nproc)
        if processes > 1:
            return launch.start(processes, ["train", args.config, *args.overrides])
        from collie_core.cli._quiet import quiet_libraries
        from collie_core.loop import Trainer
        from collie_core.report import run_identity

        agree(run_identity(config))
        quiet_libraries()
        Trainer(config).train()
    return 0
