"""`collie compare run.yaml --optimizers adamw,lion --adapters none,lora`: the run with each of them, and a report."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from collie_core.cli._config import add_config_arguments, add_nproc_argument
from collie_core.errors import RunError

if TYPE_CHECKING:
    from collie_core.compare.folder import Folder
    from collie_core.compare.grid import Asked, Grid

REPORT_EVERY_S = 60.0  # while there are cells to come; drawing takes a second or two


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run, and what is varied."""
    add_config_arguments(parser)
    add_nproc_argument(parser)
    parser.add_argument("--optimizers", required=True, metavar="A,B", help="optimizers, by the names that `type` has")
    parser.add_argument(
        "--adapters", default="none", metavar="A,B", help="adapters; none: train all weights (default: none)"
    )
    parser.add_argument(
        "--seeds", metavar="1,2,3", help="repeat every run with these seeds (default: that of the file)"
    )
    parser.add_argument(
        "--learning-rates",
        action="append",
        default=[],
        metavar="[OPTIMIZER=]1e-4,3e-4",
        help="try these and keep the best, for all optimizers or for one; may be repeated (default: that of the file "
        "for its optimizer, and the optimizer's own for others)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/compare"), metavar="DIR", help="a folder (default: runs/compare)"
    )
    parser.add_argument(
        "--cell-timeout", type=float, metavar="S", help="end a run that takes longer; it has failed then"
    )
    parser.add_argument("--retry-failed", action="store_true", help="run again what failed in this folder before")


def run(args: argparse.Namespace) -> int:
    """Exit code: 1 when a run failed, or none has come to an end."""
    from collie_core import launch
    from collie_core.compare.folder import Folder
    from collie_core.compare.grid import Grid

    if launch.launched():
        raise RunError("collie compare starts the processes of its runs itself: leave torchrun and srun out")
    if args.nproc is not None:
        launch.processes_to_start(args.nproc)  # refuses what every run would
    if args.cell_timeout is not None and not args.cell_timeout > 0:  # nor NaN
        raise RunError(f"--cell-timeout {args.cell_timeout:g}: must be above 0")
    notes: list[str] = []
    grid = Grid.of(_asked(args), notes=notes)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    folder = Folder(args.output)
    with folder.taken(grid):
        return _compare(args, grid, folder)


def _asked(args: argparse.Namespace) -> Asked:
    from collie_core.compare import grid

    return grid.Asked(
        config=args.config,
        overrides=args.overrides,
        optimizers=grid.parse_list("--optimizers", args.optimizers, grid.name),
        adapters=grid.parse_list("--adapters", args.adapters, grid.name),
        rates=grid.parse_rates(args.learning_rates),
        seeds=[] if args.seeds is None else grid.parse_list("--seeds", args.seeds, grid.seed),
        output=args.output,
    )


def _compare(args: argparse.Namespace, grid: Grid, folder: Folder) -> int:
    from collie_core.cli._quiet import quiet_imports
    from collie_core.compare.child import signals
    from collie_core.compare.comparison import Comparison
    from collie_core.compare.progress import make_progress
    from collie_core.compare.report import as_text, outcome, write_reports
    from collie_core.compare.results import Results
    from collie_core.report.rundir import REPORT

    def report() -> Results:
        results = Results.read(folder, grid)
        write_reports(folder, results)
        return results

    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asked through CUDA, GPUs are lost to forked processes
    quiet_imports()
    progress = make_progress()
    comparison = Comparison(
        config=args.config,
        grid=grid,
        folder=folder,
        processes=args.nproc,
        train=partial(_train, args.config, args.nproc),
        limit_s=args.cell_timeout,
        retry=args.retry_failed,
        progress=progress,
        written=_now_and_then(report),
    )
    with signals() as got, progress:
        finished = comparison.run(got)
    results = report()
    told = "\n\n".join(filter(None, (as_text(results), outcome(results))))
    print(f"\n{told}\nreport    {folder.root / REPORT}")
    if not finished:
        print(f"{got[0].name if got else 'a signal to a run'} came: the same command goes on", file=sys.stderr)
        return 128 + got[0] if got else 1  # as a shell has it
    return 0 if results.choices and all(one.status != "failed" for one in results.found) else 1


def _train(config: str, processes: int | None, overrides: Sequence[str]) -> None:
    """`collie train`, in a process that has everything imported already."""
    from collie_core.cli import train

    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    many = [] if processes is None else ["--nproc", str(processes)]
    train.run(parser.parse_args([config, *many, *overrides]))


def _now_and_then(report: Callable[[], object]) -> Callable[[], None]:
    began = time.monotonic()

    def written() -> None:
        nonlocal began
        if time.monotonic() - began > REPORT_EVERY_S:
            report()
            began = time.monotonic()

    return written
