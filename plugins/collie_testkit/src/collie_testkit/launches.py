"""Runs that the checks of a plugin share: those on as many ranks are made one after the other in one launch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, NamedTuple

from collie_testkit.context import Context
from collie_testkit.zygote import RanksFailed


class Planned(NamedTuple):
    """A call of a function of the kit on so many ranks. Those that are planned together do not write to one folder."""

    ranks: int
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


def outcome(context: Context, name: str, planned: Mapping[str, Planned]) -> list[Any]:
    """What a call has returned on each rank, once it and what is planned on as many ranks were made.

    Raises:
        RanksFailed: this one has failed.
    """
    known = context.shared.outcomes
    if name not in known:
        ranks = planned[name].ranks
        missing = {key: one for key, one in planned.items() if one.ranks == ranks and key not in known}
        known |= _launch(context, missing if context.shared.together else {name: planned[name]})
    found: list[Any] | RanksFailed = known[name]
    if isinstance(found, RanksFailed):
        raise found
    return found


def _launch(context: Context, planned: Mapping[str, Planned]) -> dict[str, Any]:
    """In one launch; where that fails, each in its own, to find out which it was."""
    calls = {name: (one.function.__module__, one.function.__name__, one.arguments) for name, one in planned.items()}
    (ranks,) = {one.ranks for one in planned.values()}
    try:
        returned = context.on_ranks(in_turn, ranks, calls, limit_s=60.0 + 30.0 * len(calls))
    except RanksFailed as error:
        if len(planned) == 1:
            return dict.fromkeys(planned, error)
        return {name: found for key, one in planned.items() for name, found in _launch(context, {key: one}).items()}
    return {name: [rank[name] for rank in returned] for name in planned}


def in_turn(calls: Mapping[str, tuple[str, str, tuple[Any, ...]]]) -> dict[str, Any]:
    """What every rank runs: what each call returns, by name."""
    return {
        name: getattr(import_module(module), function)(*arguments)
        for name, (module, function, arguments) in calls.items()
    }
