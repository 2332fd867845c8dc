"""Numbers of the machine in each row, when `train.monitors` asks for them."""

from __future__ import annotations

import time
from collections.abc import Sequence

from collie_core.hookspecs import Run
from collie_core.plugins import hookimpl


class MachineMonitor:
    """Adds, for the machine and the process of the main rank:

    * host: `host/cpu_percent`, 100 when every core is busy, and `host/memory_bytes`, resident in this process;
    * disk: `disk/read_bytes_per_second` and `disk/write_bytes_per_second`;
    * network: `network/sent_bytes_per_second` and `network/received_bytes_per_second`, this machine's own included.

    Rates and percentages are those since the last logged step.

    Args:
        names: what to watch: host, disk, network.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self._since = 0.0  # seconds of the clock, at the last logged step
        self._before: dict[str, float] = {}  # counters then

    @hookimpl
    def collie_run_start(self) -> None:
        """Begin to count."""
        self._restart()

    @hookimpl
    def collie_after_step(self, run: Run) -> None:
        """Add the numbers; those of a step that is not logged are replaced by the next."""
        seconds, counters = time.perf_counter() - self._since, self._counters()
        grown = {name: max(0.0, value - self._before.get(name, value)) for name, value in counters.items()}
        if "host" in self.names:
            busy, idle = grown.pop("busy"), grown.pop("idle")
            run.metrics["host/cpu_percent"] = 100 * busy / max(busy + idle, 1e-9)
            run.metrics["host/memory_bytes"] = _resident()
        run.metrics.update({f"{name}_bytes_per_second": value / seconds for name, value in grown.items()})

    @hookimpl
    def collie_metrics(self) -> None:
        """A step was logged."""
        self._restart()

    def _restart(self) -> None:
        self._since, self._before = time.perf_counter(), self._counters()

    def _counters(self) -> dict[str, float]:
        """What only grows: seconds of all cores, bytes. A machine without disks, as in a container, has none."""
        import psutil  # type: ignore[import-untyped]

        found: dict[str, float] = {}
        if "host" in self.names:
            times = psutil.cpu_times()
            idle = times.idle + getattr(times, "iowait", 0.0)
            # Guests are counted in user and nice already.
            guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
            found |= {"idle": idle, "busy": sum(times) - idle - guests}
        if "disk" in self.names and (disk := psutil.disk_io_counters()) is not None:
            found |= {"disk/read": disk.read_bytes, "disk/write": disk.write_bytes}
        if "network" in self.names and (network := psutil.net_io_counters()) is not None:
            found |= {"network/sent": network.bytes_sent, "network/received": network.bytes_recv}
        return found


def _resident() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)
