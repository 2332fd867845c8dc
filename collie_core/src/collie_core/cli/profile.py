"""`collie profile run.yaml`: where the time of a training step goes, and what could be won."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collie_core.cli._config import add_config_arguments, add_nproc_argument, load_config
from collie_core.errors import CollieError, RunError

if TYPE_CHECKING:
    from collie_core.config.run import RunConfig

REPORT = "profile.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run, how many steps of it, and where the traces go."""
    add_config_arguments(parser)
    add_nproc_argument(parser)
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="steps that are measured (default: 5)")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="for the traces (default: train.output_dir with -profile behind it)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Take a few steps, as `collie train` would take them, and tell where their time went."""
    from collie_core import launch, starter

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler would announce its beginning and end
    if args.steps < 1:
        raise RunError(f"--steps {args.steps}: must be at least 1")
    with launch.reported_to_launcher() as agree:
        config = load_config(args, complete=True)
        processes = launch.processes_to_start(args.nproc, config.parallel)
        if processes > 1:
            return starter.start(processes, _again(args))
        from collie_core.cli._quiet import quiet_libraries
        from collie_core.profiling.record import overrides
        from collie_core.report import run_identity

        folder = args.output or Path(f"{config.train.output_dir}-profile")
        profiled = _changed(args, overrides(args.steps, folder))
        agree(run_identity(profiled))
        quiet_libraries()
        _clear(folder)
        _profile(args, config, profiled, folder)
    return 0


def _again(args: argparse.Namespace) -> list[str]:
    """The command line of each process."""
    chosen = [f"--steps={args.steps}", *(["--json"] if args.json else [])]
    chosen += [] if args.output is None else [f"--output={args.output}"]
    return ["profile", args.config, *chosen, *args.overrides]


def _clear(folder: Path) -> None:
    """Of an earlier profile, which may have had more ranks, nothing is left that could be taken for this one's."""
    from collie_core.profiling.record import TRACE

    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in (*folder.glob(TRACE.format(rank="*")), folder / REPORT):
            old.unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"{folder} cannot be written: {error.strerror}; name another --output") from error


def _profile(args: argparse.Namespace, config: RunConfig, profiled: RunConfig, folder: Path) -> None:
    from collie_core.profiling.account import account
    from collie_core.profiling.gains import gains
    from collie_core.profiling.record import TRACE, record
    from collie_core.profiling.show import as_object, profile_text

    recordings = record(profiled, args.steps, folder)
    if int(os.environ.get("RANK", "0")) > 0:
        return
    profile = account(recordings, config.parallel.tensor_parallel_size)
    found = gains(profile, config, lambda changes: _is_allowed(args, changes))
    whole = json.dumps(as_object(profile, found), indent=2)
    (folder / REPORT).write_text(whole + "\n", encoding="utf-8")
    if args.json:
        print(whole)
        return
    sizes = config.batch_sizes(len(recordings) // config.parallel.copy_size)
    print(f"{args.steps} steps on {len(recordings)} process{'es' if len(recordings) > 1 else ''}; {sizes}\n")
    print(profile_text(profile, found))
    print(
        f"\none step of each rank, for https://ui.perfetto.dev or chrome://tracing: {folder / TRACE.format(rank='*')}"
    )


def _changed(args: argparse.Namespace, changes: Sequence[str]) -> RunConfig:
    from collie_core.config.run import RunConfig

    return RunConfig.from_yaml(args.config, [*args.overrides, *changes], notes=[], complete=True)


def _is_allowed(args: argparse.Namespace, changes: Mapping[str, Any]) -> bool:
    try:
        _changed(args, [f"{key}={json.dumps(value)}" for key, value in changes.items()])
    except CollieError:
        return False
    return True
