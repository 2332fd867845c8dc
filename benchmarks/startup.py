"""How long the command line takes to start when 50 plugin distributions are installed.

Measured is the CPU time (user + system, as the kernel accounts it for the child process) of whole commands,
median of ten: unlike wall time it does not depend on what else the machine is doing. The 50 distributions
are generated into a temporary folder on PYTHONPATH: 5 are broken, 20 import torch when they are built, and
all are listed. A probe in the child also reports whether torch was imported; our commands must not.

    python benchmarks/startup.py [--peer "trl --help"] [--runs 10]

`trl --help` and `litgpt --help` are measured beside ours when they are on PATH; --peer adds other commands,
for instance of another virtual environment. Prints a Markdown table; exit code 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.append(str(REPOSITORY / "collie_core" / "tests" / "support"))

from fake_dists import write_many  # noqa: E402

QUICKSTART = REPOSITORY / "examples" / "quickstart.yaml"
PEERS = ("trl --help", "litgpt --help")

# Runs in the child when it starts (Python imports it by itself) and tells at exit what was imported.
PROBE = """
import atexit, os, sys
def tell():
    if "torch" in sys.modules and os.environ.get("STARTUP_PROBE"):
        open(os.environ["STARTUP_PROBE"], "w").close()
atexit.register(tell)
"""


@dataclass(frozen=True)
class Measured:
    """One row of the table."""

    command: str
    seconds: float  # CPU time, median
    target: float | None = None
    torch: bool = False

    @property
    def met(self) -> bool:
        """Whether the target, if there is one, is met."""
        return self.target is None or (self.seconds <= self.target and not self.torch)


def cpu_seconds(command: Sequence[str], environment: dict[str, str]) -> float:
    """User and system time of one run of `command`; it must succeed."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"{shlex.join(command)} ended with exit code {process.returncode}")
    return usage.ru_utime + usage.ru_stime


def measure(command: Sequence[str], site: Path, runs: int, target: float | None = None) -> Measured:
    """The median over `runs`, after one run that warms the file cache."""
    marker = site / "torch-was-imported"
    marker.unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(site), "STARTUP_PROBE": str(marker)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # as users run it: with compiled modules
    times = [cpu_seconds(command, environment) for _ in range(runs + 1)][1:]
    shown = shlex.join([Path(command[0]).name, *(Path(word).name for word in command[1:])])
    return Measured(shown, statistics.median(times), target, marker.exists())


def measure_all(site: Path, runs: int, peers: Sequence[str]) -> list[Measured]:
    """Our three commands, then the peers that exist."""
    collie = str(Path(sys.executable).with_name("collie"))
    ours = [
        ([collie, "--help"], 0.15),
        ([collie, "plugins"], 0.3),
        ([collie, "validate", str(QUICKSTART)], 1.0),
    ]
    rows = [measure(command, site, runs, target) for command, target in ours]
    commands = [shlex.split(peer) for peer in peers]
    return rows + [measure(command, site, runs) for command in commands if shutil.which(command[0])]


def table(rows: Sequence[Measured]) -> str:
    """Markdown."""
    lines = ["| command | CPU seconds | target | torch imported |", "|---|--:|--:|---|"]
    for row in rows:
        target = "" if row.target is None else f"{row.target:g}{'' if row.met else ' (missed)'}"
        lines.append(f"| `{row.command}` | {row.seconds:.3f} | {target} | {'yes' if row.torch else 'no'} |")
    return "\n".join(lines)


def main() -> int:
    """Exit code: 0 when every target is met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--peer", action="append", default=[], help="a further command to measure")
    parser.add_argument("--runs", type=int, default=10)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder)
        write_many(site, count=50, broken=5, heavy=20)
        (site / "sitecustomize.py").write_text(PROBE, encoding="utf-8")
        rows = measure_all(site, args.runs, [*PEERS, *args.peer])
    print(table(rows))
    return 0 if all(row.met for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
