"""What would make a run smaller that has run out of memory, in a process of its own.

The run that failed cannot plan by itself: beside its process group nothing can be forked. It starts this module, writes
a `Request` to it, and reads a line for each answer, so that what was found in time counts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, cast

from collie_core.errors import CollieError

if TYPE_CHECKING:
    from collie_core.config.run import RunConfig
    from collie_core.plan.plan import Shape
    from collie_core.plan.remedy import Changes

ENOUGH = 3
LEAST = 0.1  # of the plan, that a way out saves where there was free memory enough, but not in one piece


@dataclass(frozen=True)
class Request:
    """What failed."""

    config: str  # YAML, with the precision of the run
    processes: int
    sharing: int  # ranks that share their memory
    gpu: bool
    short: int  # bytes that were missing


def as_json(request: Request) -> str:
    """For the standard input of this module."""
    return json.dumps(asdict(request))


def main() -> None:
    """Print what the plan says of the run as it is, then each way out, as JSON."""
    from collie_core.cli._quiet import quiet_libraries
    from collie_core.config.run import RunConfig
    from collie_core.plan.before_run import changed, components_text
    from collie_core.plan.children import Killed
    from collie_core.plan.plan import Shape, make_plan
    from collie_core.plan.room import Room
    from collie_core.report import text

    request = Request(**json.load(sys.stdin))
    quiet_libraries()
    config, room = RunConfig.from_text(request.config), Room(0, request.sharing)
    plan = make_plan(config, request.processes, gpu=request.gpu)
    peak, now = plan.largest.prediction.peak, room.needed(plan.predicted)
    together = f", all {room.ranks} ranks" if room.ranks > 1 else ""
    _answer(f"{text.memory(peak.total)} at the peak, in {peak.phase}: {components_text(peak)}")
    least, found = max(request.short, round(LEAST * now)), 0
    for changes in _candidates(config, Shape.of(config, request.processes), gpu=request.gpu) if least < now else ():
        try:
            smaller = make_plan(changed(config, changes), request.processes, gpu=request.gpu)
        except Killed:
            raise
        except CollieError:  # what is refused is no way out
            continue
        if (needed := room.needed(smaller.predicted)) <= now - least:
            _answer(
                f"{' '.join(f'{key}={value}' for key, value in changes.items())}  ({text.memory(needed)}{together})"
            )
            if (found := found + 1) == ENOUGH:
                return


def _answer(line: str) -> None:
    print(json.dumps(line), flush=True)


def _candidates(config: RunConfig, shape: Shape, *, gpu: bool) -> Iterator[Changes]:
    """Each step of the ladder by itself, half the length, then steps together; none twice."""
    from collie_core.plan.before_run import changed
    from collie_core.plan.plan import Shape
    from collie_core.plan.remedy import ladder

    steps, given = ladder(gpu=gpu), cast("list[Changes]", [{}])
    half: Changes = {"data.max_length": config.data.max_length // 2}
    for changes in [*(step(config, shape) for step in dict.fromkeys(steps)), half]:
        if changes not in given:
            given.append(changes)
            yield changes
    together: Changes = {}
    for step in steps:
        try:
            so_far = changed(config, together)
            more = step(so_far, Shape.of(so_far, shape.processes))
            changed(config, together | more)
        except CollieError:
            continue
        together = together | more
        if together not in given:
            given.append(together)
            yield together


if __name__ == "__main__":
    main()
