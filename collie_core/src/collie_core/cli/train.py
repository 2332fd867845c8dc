"""`collie train run.yaml`: fine-tune or pre-train, on every GPU of this machine."""

from __future__ import annotations

import argparse
import sys

from collie_core.cli._config import add_config_arguments, add_nproc_argument, load_config
from collie_core.errors import RunError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The config file and its overrides."""
    add_config_arguments(parser)
    add_nproc_argument(parser)
    parser.add_argument(
        "--resume-explain",
        action="store_true",
        help="say what the run would go on from, and what changes; do not train",
    )
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=0,
        metavar="N",
        help="start all processes again from the last checkpoint, up to N times, when one is killed, lost or hangs; "
        "needs checkpoint.save_steps",
    )
    parser.add_argument("--force", action="store_true", help="start although the plan says that memory will not do")


def run(args: argparse.Namespace) -> int:
    """Train as the file says; the config is checked before torch is imported."""
    from collie_core import launch, starter
    from collie_core.checkpoint.signals import Leave, listening

    if args.max_restarts < 0:
        raise RunError(f"--max-restarts {args.max_restarts}: must be at least 0")
    try:
        with launch.reported_to_launcher() as agree:
            config = load_config(args, complete=True)
            if args.resume_explain:
                from collie_core.checkpoint.explain import explain

                print(explain(config, args.nproc or config.parallel.fewest_processes))
                return 0
            processes = launch.processes_to_start(args.nproc, config.parallel, restarts=args.max_restarts)
            if processes > 1 or args.max_restarts:
                arguments = ["train", args.config, *args.overrides, *["--force"] * args.force]
                return starter.start(processes, arguments, config, max_restarts=args.max_restarts)
            if changes := launch.restart_overrides(config):
                args.overrides += changes
                config = load_config(args, complete=True)
            with listening(config.checkpoint.save_steps is not None, loading=True):
                from collie_core.cli._quiet import quiet_libraries
                from collie_core.loop import Trainer
                from collie_core.plan.before_run import plan_before_run
                from collie_core.report import run_identity

                agree(run_identity(config))
                quiet_libraries()
                Trainer(config, callbacks=plan_before_run(config, force=args.force)).train()
    except Leave as leave:  # of a process alone
        print(leave, file=sys.stderr)
    return 0
