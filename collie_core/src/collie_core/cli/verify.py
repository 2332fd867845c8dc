"""`collie verify parity run.yaml --a tp2pp2 --b dp1`: whether a run trains on one topology as on another."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from collie_core.cli._config import add_config_arguments, load_config
from collie_core.errors import RunError

if TYPE_CHECKING:
    from collie_core.config.run import RunConfig
    from collie_core.parity import Record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to verify, of which run, on which topologies."""
    parser.add_argument(
        "what",
        choices=["parity"],
        help="parity: the first steps on two topologies, with the same samples, must give the same losses and "
        "gradient norms; where they do not, the first module whose output differs is named",
    )
    parser.add_argument("--a", metavar="TOPOLOGY", help="sizes and ZeRO stage, such as tp2pp2dp2zero1")
    parser.add_argument("--b", metavar="TOPOLOGY", default="dp1", help="what to compare with (default: dp1)")
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="optimizer steps (default: 3)")
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)  # what each of the processes is told
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Exit code: 1 when they differ."""
    from collie_core import launch, parity

    if args.record:
        with launch.reported_to_launcher() as agree:
            from collie_core.cli._quiet import quiet_libraries

            config = load_config(args, complete=True)
            agree({})
            quiet_libraries()
            parity.record(config, args.record)
        return 0
    if args.a is None:
        raise RunError("--a is missing: the topology to verify, such as tp2pp2")
    if args.steps < 1:
        raise RunError(f"--steps {args.steps}: must be at least 1")
    first, second, dtype = _rehearse(args)
    print(f"\n{_table(args.a, args.b, first, second)}\n")
    compared = parity.Comparison.of(first, second, parity.TOLERANCE[dtype])
    print(f"{'the same' if compared.same else 'NOT the same'}: {compared}")
    if compared.same:
        return 0
    print(_explanation(first, second, compared.tolerance * parity.OUTPUT_TOLERANCE))
    return 1


def _rehearse(args: argparse.Namespace) -> tuple[Record, Record, str]:
    """A few steps on both topologies, each in processes of its own; and their precision.

    Raises:
        CollieError: the run cannot be what was asked for; before any process starts, as far as that is known then.
    """
    from collie_core import parity

    sides = [parity.Sizes.parse(name) for name in (args.a, args.b)]
    a = sides[0]  # the configuration is written for such a topology
    written = [f"parallel.tensor_parallel_size={a.tp}", f"parallel.pipeline_parallel_size={a.pp}"]
    written += [f"parallel.zero_stage={a.zero}", "parallel.data_parallel_size=auto"]
    config = _config(args, written)
    global_batch = config.train.global_batch_size or config.global_batch_size(max(side.dp for side in sides))
    with tempfile.TemporaryDirectory(prefix="collie-verify-") as root:
        folders = [Path(root) / side for side in "ab"]
        changes = [
            parity.rehearsal(config, side, global_batch=global_batch, steps=args.steps, folder=folder)
            for side, folder in zip(sides, folders, strict=True)
        ]
        for changed in changes:
            _config(args, changed)
        dtype = parity.dtype_of(config)
        print(f"{args.steps} steps of {global_batch} samples, {dtype}")
        for name, side, changed, folder in zip((args.a, args.b), sides, changes, folders, strict=True):
            folder.mkdir()
            _train(args, name, side.processes, [*args.overrides, *changed], folder)
        first, second = map(parity.Record.read, folders)
    return first, second, dtype


def _config(args: argparse.Namespace, changed: list[str]) -> RunConfig:
    again = argparse.Namespace(config=args.config, overrides=[*args.overrides, *changed])
    return load_config(again, complete=True)


def _train(args: argparse.Namespace, name: str, processes: int, overrides: list[str], folder: Path) -> None:
    from collie_core import starter

    print(f"  {name} on {processes} process{'es' if processes > 1 else ''} ...", flush=True)
    try:
        starter.start(processes, ["verify", "parity", args.config, "--record", str(folder), *overrides])
    except RunError as error:
        raise RunError(f"{name} does not train: {error}") from error


def _table(a: str, b: str, first: Record, second: Record) -> str:
    """Losses and gradient norms of every step side by side."""
    width = max(14, len(a), len(b))
    head = [f"{'step':>4}", *(f"{title:>{width}}" for title in (a, b, "difference"))]
    lines: list[str] = []
    for title, mine, theirs in (("loss", first.losses, second.losses), ("gradient norm", first.norms, second.norms)):
        lines += ["", f"{title}:"] if lines else [f"{title}:"]
        lines.append("  ".join(head))
        for step, (one, other) in enumerate(zip(mine, theirs, strict=True), start=1):
            values = f"{one:>{width}.8f}  {other:>{width}.8f}  {one - other:>{width}.1e}"
            lines.append(f"{step:>4}  {values}")
    return "\n".join(lines)


def _explanation(first: Record, second: Record, tolerance: float) -> str:
    """Where the difference begins."""
    from collie_core import parity

    module = parity.first_difference(first, second, tolerance)
    if module is not None:
        return (
            f"the first module whose output differs is {module.where}: by {module.size:.1e} of its size, most of all "
            f"for sample {module.position} of the run"
        )
    compared = list(parity.differences(first, second))
    agree = f"the outputs of all {len(compared)} modules that could be compared agree in the first forward"
    gradient = parity.first_gradient_difference(first, second, tolerance)
    if gradient is not None:
        return (
            f"{agree}; in backward the first gradient that differs is that of {gradient.where}: by {gradient.size:.1e}"
        )
    if first.gradients and second.gradients:
        return f"{agree}, and so do the gradients of the first step: the difference begins in the update"
    return f"{agree}: the difference begins in backward or in the update (without ZeRO the gradients are compared too)"
