"""What a run shows and leaves behind: each part an observer, an object with event hooks, on rank 0 only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from collie_core.report.rundir import prepare_run_directory, refuse_used_directory, run_identity

if TYPE_CHECKING:
    from collie_core.config.run import RunConfig
    from collie_core.parts import Parts
    from collie_core.topology import Topology

__all__ = ["prepare_run_directory", "refuse_used_directory", "run_facts", "run_identity", "standard_observers"]


def standard_observers(config: RunConfig, topology: Topology) -> list[object]:
    """The standard observers of a run; none on ranks that do not write files.

    pluggy calls the last one first, so that the console speaks when the files are written.

    Raises:
        RunError: what a tracker of `report_to` needs is not installed.
        PluginError: a tracker cannot be loaded or made.
    """
    if not topology.is_main:
        return []
    from collie_core.report.console import ConsoleReporter
    from collie_core.report.html import HtmlReport
    from collie_core.report.metrics import MetricsFile

    trackers = [config.registry.tracker(section) for section in config.report_to]
    standard: list[object] = [ConsoleReporter(), HtmlReport(), MetricsFile(), *trackers]
    if config.train.monitors:
        from collie_core.report.monitors import MachineMonitor

        standard.append(MachineMonitor(config.train.monitors))
    return standard


def run_facts(parts: Parts) -> dict[str, Any]:
    """See `collie_core.report.facts.run_facts`; imported when called, as it needs the data and model side."""
    from collie_core.report.facts import run_facts as facts

    return facts(parts)
