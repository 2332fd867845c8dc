"""`collie doctor`: whether this machine is fit to train, and what stands in the way."""

from __future__ import annotations

import argparse
import json
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collie_core.doctor.finding import Finding

SECTIONS = {
    "versions": "collie_core.doctor.versions",
    "devices": "collie_core.doctor.devices",
    "interconnect": "collie_core.doctor.interconnect",
    "file systems": "collie_core.doctor.files",
    "environment": "collie_core.doctor.environment",
    "plugins": "collie_core.doctor.plugins",
    "training": "collie_core.doctor.smoke",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How to print it."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Exit code: 0 when nothing is an error; the smoke run on two processes is one that passed then."""
    found: dict[str, list[Finding]] = {}
    for section in SECTIONS:
        found[section] = []
        if not args.json:
            print(section, flush=True)
        for finding in _findings(section):
            found[section].append(finding)
            if not args.json:
                print(_text(finding), flush=True)
    everything = [finding for findings in found.values() for finding in findings]
    errors, warnings = (sum(finding.level == level for finding in everything) for level in ("error", "warning"))
    if args.json:
        sections = {section: list(map(asdict, findings)) for section, findings in found.items()}
        print(
            json.dumps({"fit": errors == 0, "errors": errors, "warnings": warnings} | {"findings": sections}, indent=2)
        )
    else:
        print(f"\n{_verdict(errors, warnings)}")
    return 1 if errors else 0


def _findings(section: str) -> Iterator[Finding]:
    """Of a section. A machine may be broken in any way: a check that ends by it is a finding, and the others follow."""
    from collie_core.cli._quiet import quiet_libraries
    from collie_core.doctor.finding import error
    from collie_core.watch import reason_of

    try:
        if section == "plugins":  # from here on libraries are imported that would talk
            quiet_libraries()
        check: Callable[[], Iterator[Finding]] = import_module(SECTIONS[section]).check
        yield from check()
    except Exception as failure:  # noqa: BLE001
        if os.environ.get("COLLIE_TRACEBACK", "0") not in ("", "0"):
            traceback.print_exc()
        yield error(f"this cannot be examined: {reason_of(failure)}", "COLLIE_TRACEBACK=1 shows where it stopped")


def _text(finding: Finding) -> str:
    mark = {"ok": "ok", "warning": "warning", "error": "ERROR"}[finding.level]
    lines: Sequence[str] = finding.what.splitlines() + ([f"→ {finding.way_out}"] if finding.way_out else [])
    return "\n".join(f"  {mark if not number else '':<8} {line}" for number, line in enumerate(lines))


def _verdict(errors: int, warnings: int) -> str:
    counted = [
        f"{count} {name}{'s' if count > 1 else ''}"
        for count, name in ((errors, "error"), (warnings, "warning"))
        if count
    ]
    if errors:
        return f"NOT fit to train: {' and '.join(counted)}"
    return f"fit to train{f', with {counted[0]}' if counted else ''}"
