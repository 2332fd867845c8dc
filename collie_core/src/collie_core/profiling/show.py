"""A profile as text and as plain data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from collie_core.profiling.account import PARTS, Profile
from collie_core.profiling.gains import Changes, Gain

MOST_GAINS = 3


def profile_text(profile: Profile, found: Sequence[Gain]) -> str:
    """A row for each rank, who is late, and what could be won."""
    return "\n".join([*_table(profile), "", *_remarks(profile), "", *_gains(found)])


def _table(profile: Profile) -> Iterator[str]:
    names = ["ms per step", *PARTS, "step"]
    rows = [[f"rank {rank.rank}", *_cells(rank.parts)] for rank in profile.ranks]
    if len(rows) > 1:
        rows.append(["mean", *_cells(profile.mean)])
    rows.append(["share", *(f"{100 * seconds / profile.step_s:.1f} %" for seconds in profile.mean.values()), "100 %"])
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    for row in (names, *rows):
        first, *others = (
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join([first, *others])


def _cells(parts: Mapping[str, float]) -> list[str]:
    return [f"{1000 * seconds:.1f}" for seconds in (*parts.values(), sum(parts.values()))]


def _remarks(profile: Profile) -> Iterator[str]:
    least, most = 1000 * min(profile.steps), 1000 * max(profile.steps)
    yield f"a step took {least:.1f} to {most:.1f} ms; {profile.tokens / profile.step_s:,.0f} tokens per second"
    yield f"the parts add up to the wall time of the steps to {100 * profile.error:.2g} %"


def _gains(found: Sequence[Gain]) -> Iterator[str]:
    if not found:
        yield "nothing that could be changed takes 1 % of the step or more"
        return
    yield "the largest possible gains; each is an upper bound, and they overlap:"
    for number, gain in enumerate(found[:MOST_GAINS], start=1):
        yield f"{number}. up to {100 * gain.share:.0f} % of the step: {gain.measured}"
        yield f"   {gain.way}"
        yield from (f"     {line}" for line in yaml_lines(gain.changes))


def yaml_lines(changes: Changes) -> list[str]:
    """As they stand in the file: data: {packing: true}."""
    import yaml

    sections: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    return (
        yaml.safe_dump(sections, default_flow_style=None, sort_keys=False, width=1000).splitlines() if sections else []
    )


def as_object(profile: Profile, found: Sequence[Gain]) -> dict[str, Any]:
    """Everything, as JSON takes it. Times are seconds per step."""
    return {
        "step_time_s": profile.step_s,
        "steps_s": list(profile.steps),
        "tokens_per_step": profile.tokens,
        "computed_tokens_per_step": profile.computed_tokens,
        "packed_tokens_per_step": profile.packed_tokens,
        "tokens_per_second": profile.tokens / profile.step_s,
        "micro_batches": profile.micro_batches,
        "parts_s": profile.mean,
        "error": profile.error,
        "ranks": [asdict(rank) for rank in profile.ranks],
        "gains": [asdict(gain) | {"yaml": yaml_lines(gain.changes)} for gain in found[:MOST_GAINS]],
    }
