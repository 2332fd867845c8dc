"""`collie plan run.yaml`: how much memory the ranks of a run will hold, without running it."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collie_core.cli._config import add_config_arguments, load_config
from collie_core.errors import RunError

if TYPE_CHECKING:
    from collie_core.config.run import RunConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run, for how many processes, and on what."""
    add_config_arguments(parser)
    many = parser.add_mutually_exclusive_group()
    many.add_argument(
        "--nproc", type=int, metavar="N", help="processes on this machine (default: as few as `parallel:` needs)"
    )
    many.add_argument("--gpus", type=int, metavar="N", help="plan for N GPUs, whether there are any here or not")
    parser.add_argument(
        "--gpu-memory", metavar="SIZE", help="say whether the run fits into GPUs of this memory, as in 80GiB"
    )
    parser.add_argument(
        "--host-memory", metavar="SIZE", help="memory of a machine, for what its GPUs offload (default: enough)"
    )
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="the GPUs stand in N machines (default: 1)")
    parser.add_argument(
        "--table", action="store_true", help="rank the strategies that would fit on --gpus by their speed"
    )
    parser.add_argument(
        "--hardware", default="h100", metavar="NAME", help="of --table: a100, h100, h200 or l40s (default: h100)"
    )
    parser.add_argument("--optimizers", metavar="NAMES", help="of --table: try each of these, as in adamw,lion")
    parser.add_argument("--adapters", metavar="NAMES", help="of --table: try each of these, as in none,lora")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--measure", action="store_true", help="take two real steps on this machine too, and print what they held"
    )
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)  # what each of the measured processes is told


def run(args: argparse.Namespace) -> int:
    """Exit code: 1 when the run does not fit into `--gpu-memory`."""
    from collie_core.plan.show import parse_bytes

    if args.record:
        return _measure_here(args)
    memory, host = (None if size is None else parse_bytes(size) for size in (args.gpu_memory, args.host_memory))
    if args.table and args.gpus is None:
        raise RunError("--table needs --gpus, the number of GPUs to plan for")
    if host is not None and memory is None and not args.table:
        raise RunError("--host-memory needs --gpu-memory, of the GPUs that offload into it")
    config = load_config(args)
    processes = _processes(args, config)
    if args.nodes < 1 or processes % args.nodes:
        raise RunError(f"--nodes {args.nodes}: {processes} GPUs cannot stand in so many machines alike")
    gpu, dtype = _target(args, config)
    if dtype != config.model.dtype:
        args.overrides = [*args.overrides, f"model.dtype={dtype}"]
        config = load_config(args)
    if args.table:
        return _table(args, memory, host)
    from collie_core.cli._quiet import quiet_libraries
    from collie_core.plan.measure import measure_ranks
    from collie_core.plan.plan import as_object, make_plan
    from collie_core.plan.remedy import find_remedy
    from collie_core.plan.room import Room
    from collie_core.plan.show import plan_text, remedy_text, verdict

    quiet_libraries()
    plan = make_plan(config, processes, gpu=gpu)
    measured = measure_ranks(args.config, args.overrides, processes) if args.measure else None
    room = None if memory is None else Room(memory, 1, host=Room(host, processes // args.nodes) if host else None)
    fits = room is None or room.holds(plan)
    if not args.json:
        print(plan_text(plan, measured), flush=True)
    if room is not None and not args.json:
        print(verdict(plan, room), flush=True)
    remedy = None
    if room is not None and not fits:
        remedy = find_remedy(lambda changes: _changed(args, changes), processes, room.holds, gpu=gpu)
    if args.json:
        judged: dict[str, Any] = {} if memory is None else {"gpu_memory_bytes": memory, "fits": fits}
        judged |= {} if host is None else {"host_memory_bytes": host}
        judged |= {} if fits else {"would_fit_with": None if remedy is None else remedy.overrides}
        print(json.dumps(as_object(plan, measured) | judged, indent=2))
    elif not fits:
        print(remedy_text(remedy, processes))
    return 0 if fits else 1


def _table(args: argparse.Namespace, memory: int | None, host: int | None) -> int:
    """Exit code: 1 when nothing fits."""
    from collie_core.cli._quiet import quiet_libraries
    from collie_core.plan.hardware import hardware_named
    from collie_core.plan.show_table import table_object, table_text
    from collie_core.plan.table import Machines, make_table

    hardware = hardware_named(args.hardware)
    machines = Machines(hardware, args.gpus, args.nodes, memory or hardware.memory, host)
    quiet_libraries()
    table = make_table(lambda changes: _changed(args, changes), machines, _choices(args))
    if args.json:
        print(json.dumps(table_object(table, machines), indent=2))
    else:
        print(table_text(table, machines))
    return 0 if table.ranked else 1


def _choices(args: argparse.Namespace) -> list[tuple[tuple[str, str], ...]]:
    """Every optimizer with every adapter that is named, as overrides."""
    optimizers = [[("optimizer.type", name)] for name in args.optimizers.split(",")] if args.optimizers else [[]]
    names = args.adapters.split(",") if args.adapters else []
    adapters = [[("adapter", "null")] if name == "none" else [("adapter.type", name)] for name in names] or [[]]
    return [(*optimizer, *adapter) for optimizer in optimizers for adapter in adapters]


def _changed(args: argparse.Namespace, changes: Mapping[str, str | int]) -> RunConfig:
    from collie_core.config.run import RunConfig

    overrides = [*args.overrides, *(f"{key}={value}" for key, value in changes.items())]
    return RunConfig.from_yaml(args.config, overrides, notes=[])


def _processes(args: argparse.Namespace, config: RunConfig) -> int:
    for name, number in (("--nproc", args.nproc), ("--gpus", args.gpus)):
        if number is not None and number < 1:
            raise RunError(f"{name} {number}: must be at least 1")
    return args.nproc or args.gpus or config.parallel.fewest_processes


def _target(args: argparse.Namespace, config: RunConfig) -> tuple[bool, str]:
    """Whether to plan for GPUs, and the precision there.

    Raises:
        RunError: a measurement is wanted on GPUs, and there are none.
    """
    import torch

    from collie_core.plan.before_run import with_precision

    here, asked = torch.cuda.is_available(), args.gpus is not None or args.gpu_memory is not None
    if args.measure and asked and not here:
        raise RunError("--measure takes its steps on this machine, which has no GPU; plan with --nproc instead")
    if asked and not here:
        return True, "bfloat16" if config.model.dtype == "auto" else config.model.dtype
    return here, with_precision(config, gpu=here).model.dtype


def _measure_here(args: argparse.Namespace) -> int:
    """One of the processes of `measure_ranks`."""
    from collie_core import launch

    with launch.reported_to_launcher() as agree:
        from collie_core.cli._quiet import quiet_libraries
        from collie_core.plan.measure import measure_rank

        config = load_config(args)
        agree({})
        quiet_libraries()
        held = measure_rank(config)
        (args.record / f"{int(os.environ['RANK'])}").write_text(str(held))
    return 0
