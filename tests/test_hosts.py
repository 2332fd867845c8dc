"""Two hosts: network namespaces joined by a cable that can be cut, under the commands of a real cluster."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from combos import in_everything, more
from fake_dists import write_distribution

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ALL_END_WITHIN_S = 30.0
STARTED_WITHIN_S = 240.0  # eight processes that import torch on two cores

PLUGIN = """
import os, time
from collie_core.api import RunError, hookimpl

@hookimpl
def collie_run_start(run):
    if os.environ.get("FAULT") == "error" and run.topology.rank == run.topology.world_size - 1:
        raise RunError("the disk of this machine is full")

@hookimpl
def collie_after_step(run):
    time.sleep(float(os.environ.get("STEP_S", "0")))
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


@dataclass
class Job:
    """What runs on one host."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    reader: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stdout or ()), daemon=True)
        self.reader.start()

    @property
    def said(self) -> str:
        return "".join(self.lines)

    def tells(self, sentence: str) -> int:
        """How often it stands in a line of its own, not in what torchrun quotes."""
        return self.said.splitlines().count(sentence)

    def wait_for(self, text: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.said:
            assert self.process.poll() is None, f"ended before {text!r}:\n{self.said}"
            assert time.monotonic() < deadline, f"no {text!r} within {seconds} s:\n{self.said}"
            time.sleep(0.05)

    def end(self) -> None:
        """Whatever still runs."""
        try:
            family = [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]
        except psutil.NoSuchProcess:
            family = []
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.send_signal(signal.SIGKILL)
        self.process.wait()
        self.reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def ranks(self) -> list[psutil.Process]:
        """The processes that train."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if is_rank(child)]


def is_rank(process: psutil.Process) -> bool:
    """Whether it trains: torchrun's own command line holds that of the ranks."""
    with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        words = process.cmdline()
        return "collie_core.cli" in words and "torch.distributed.run" not in words
    return False


def runs(process: psutil.Process) -> bool:
    """Not when its parent has merely not asked yet how it ended."""
    with suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


@dataclass
class Host:
    """One end of the cable."""

    name: str
    namespace: str
    device: str
    address: str
    jobs: list[Job] = field(default_factory=list)

    def start(self, *command: str, **variables: str) -> Job:
        """Run a command there, under the host's own name."""
        there = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "--fork", "--kill-child", "sh", "-c"]
        process = subprocess.Popen(
            [*there, f'hostname {self.name}; exec "$@"', "sh", *command],
            env=clean_environment() | {"GLOO_SOCKET_IFNAME": self.device} | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.jobs.append(Job(process))
        return self.jobs[-1]


def clean_environment() -> dict[str, str]:
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_ERROR_FILE")
    clean = {name: value for name, value in os.environ.items() if name not in launcher}
    return clean | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


class Cable:
    """Two hosts and what joins them."""

    def __init__(self) -> None:
        mark = f"{os.getpid() % 100000}"
        self.hosts = [
            Host(f"host{end}", f"collie{mark}{end}", f"v{mark}{end}", f"10.77.0.{number}")
            for number, end in enumerate("AB", start=1)
        ]

    def lay(self) -> None:
        a, b = self.hosts
        for host in self.hosts:
            ip("netns", "add", host.namespace)
        ip("link", "add", a.device, "type", "veth", "peer", "name", b.device)
        for host in self.hosts:
            ip("link", "set", host.device, "netns", host.namespace)
            ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", host.device)
            ip("-n", host.namespace, "link", "set", "lo", "up")
            ip("-n", host.namespace, "link", "set", host.device, "up")

    def cut(self) -> None:
        ip("-n", self.hosts[1].namespace, "link", "set", self.hosts[1].device, "down")

    def remove(self) -> None:
        for host in self.hosts:
            for job in host.jobs:
                job.end()
            subprocess.run(["ip", "netns", "del", host.namespace], check=False, capture_output=True, timeout=20)


@pytest.fixture
def hosts() -> Iterator[Cable]:
    """Two hosts; skips where they cannot be made."""
    missing = [tool for tool in ("ip", "unshare") if shutil.which(tool) is None]
    if sys.platform != "linux" or missing:
        pytest.skip(f"needs Linux with {' and '.join(missing or ['network namespaces'])}")
    if os.geteuid() != 0:
        pytest.skip("making network namespaces needs root")
    cable = Cable()
    try:
        cable.lay()
    except subprocess.CalledProcessError as error:
        cable.remove()
        pytest.skip(f"this machine makes no network namespaces: {error.stderr.decode().strip()}")
    try:
        yield cable
    finally:
        cable.remove()


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A plugin that slows training down or fails, as the environment says."""
    folder = tmp_path / "site"
    hooks = {"collie.hooks": {"hosts": "collie_hosts"}}
    write_distribution(folder, "collie-hosts", groups=hooks, files={"collie_hosts.py": PLUGIN})
    return folder


@pytest.fixture
def run_file(tiny_llama: Path, instructions: Path, tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    sections: dict[str, dict[str, Any]] = {
        "model": {"model_name_or_path": str(tiny_llama)},
        "data": {"train": str(instructions), "max_length": 128, "cache_dir": str(tmp_path / "cache")},
        "train": {"max_steps": 4, "global_batch_size": 8, "output_dir": str(tmp_path / "run")},
        "optimizer": {"type": "adamw", "lr": 1e-3},
    }
    path.write_text(yaml.safe_dump(sections))
    return path


def torchrun(cable: Cable, host: Host, per_host: int, *arguments: str, rendezvous: bool = False) -> list[str]:
    """The command of a cluster: with the place of each machine written down, or found at a rendezvous."""
    first = cable.hosts[0]
    place = [f"--node_rank={cable.hosts.index(host)}", f"--master_addr={first.address}", "--master_port=29411"]
    if rendezvous:
        place = ["--rdzv-backend=c10d", f"--rdzv-endpoint={first.address}:29411", "--rdzv-id=job"]
        # What the name service of a cluster tells it.
        place += [f"--rdzv-conf=is_host={int(host is first)}", f"--local-addr={host.address}"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--nproc_per_node={per_host}", *place]
    return [*launcher, "-m", "collie_core.cli", "train", *arguments]


def srun(cable: Cable, folder: Path, per_host: int, *arguments: str, **variables: str) -> list[Job]:
    """As Slurm starts the processes: nobody ends the others when one fails."""
    scontrol = folder / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho {cable.hosts[0].address}\n")
    scontrol.chmod(0o755)
    step = {"SLURM_STEP_NUM_TASKS": str(2 * per_host), "SLURM_STEP_NODELIST": "host[A-B]", "SLURM_JOB_ID": "9411"}
    jobs = []
    for rank in range(2 * per_host):
        node, local = divmod(rank, per_host)
        task = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(local), "SLURM_NODEID": str(node)}
        everything = step | task | variables | {"PATH": f"{folder}:{os.environ['PATH']}"}
        command = [sys.executable, "-m", "collie_core.cli", "train", *arguments]
        jobs.append(cable.hosts[node].start(*command, **everything))
    return jobs


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def all_end_within(seconds: float, ranks: list[psutil.Process]) -> float:
    began = time.monotonic()
    while alive := [rank for rank in ranks if runs(rank)]:
        assert time.monotonic() - began < seconds, f"{len(alive)} of {len(ranks)} ranks still run"
        time.sleep(0.1)
    return time.monotonic() - began


TP2PP2DP2 = (
    "parallel.tensor_parallel_size=2",
    "parallel.pipeline_parallel_size=2",
    "parallel.data_parallel_size=2",
    "parallel.zero_stage=1",
)


def test_two_hosts_give_the_losses_of_one_process(hosts: Cable, run_file: Path, tmp_path: Path) -> None:
    alone = subprocess.run(
        [sys.executable, "-m", "collie_core.cli", "train", str(run_file), f"train.output_dir={tmp_path / 'one'}"],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert alone.returncode == 0, alone.stderr
    for host in hosts.hosts:
        host.start(*torchrun(hosts, host, 4, str(run_file), *TP2PP2DP2, rendezvous=True))
    for host in hosts.hosts:
        job = host.jobs[0]
        job.process.wait(timeout=STARTED_WITHIN_S)
        assert job.process.returncode == 0, job.said
    one, eight = losses(tmp_path / "one"), losses(tmp_path / "run")
    assert len(one) == len(eight) == 4
    assert max(abs(first - second) for first, second in zip(one, eight, strict=True)) <= 1e-5


@in_everything
def test_a_cut_cable_ends_both_hosts(hosts: Cable, run_file: Path, site: Path) -> None:
    arguments = (str(run_file), *TP2PP2DP2, "train.max_steps=10000")
    a, b = (
        host.start(*torchrun(hosts, host, 4, *arguments), PYTHONPATH=str(site), STEP_S="0.2") for host in hosts.hosts
    )
    a.wait_for("step 3/", STARTED_WITHIN_S)
    ranks = [*a.ranks(), *b.ranks()]
    assert len(ranks) == 8
    hosts.cut()
    took = all_end_within(ALL_END_WITHIN_S, ranks)
    print(f"all ranks ended {took:.1f} s after the cut")
    for job, who in ((a, "ranks 4-7 of 8 on hostB"), (b, "rank 0 of 8 on hostA")):
        assert job.process.wait(timeout=ALL_END_WITHIN_S) != 0  # torchrun
        assert job.tells(f"no sign of life from {who} for 15 s: the machine or its network is gone") == 1


def test_a_failure_on_one_host_ends_both(hosts: Cable, run_file: Path, site: Path) -> None:
    arguments = (str(run_file), "train.max_steps=10000")
    jobs = [
        host.start(*torchrun(hosts, host, 2, *arguments, rendezvous=True), PYTHONPATH=str(site), FAULT="error")
        for host in hosts.hosts
    ]
    said = "rank 3 of 4 on hostB failed: the disk of this machine is full"
    jobs[1].wait_for(said, STARTED_WITHIN_S)
    for job in jobs:
        assert job.process.wait(timeout=ALL_END_WITHIN_S) != 0
        assert job.tells(said) == 1


@in_everything
def test_a_file_that_one_host_lacks_ends_both(hosts: Cable, run_file: Path) -> None:
    """Before there is a process group."""
    files = (run_file, run_file.with_name("missing.yaml"))
    jobs = [host.start(*torchrun(hosts, host, 2, str(file))) for host, file in zip(hosts.hosts, files, strict=True)]
    jobs[1].wait_for("missing.yaml: the file: cannot be read", STARTED_WITHIN_S)
    for job in jobs:
        assert job.process.wait(timeout=ALL_END_WITHIN_S) != 0
        assert re.search(r"^rank [23] of 4 on hostB failed: .*missing\.yaml: the file: cannot be read", job.said, re.M)


@in_everything
def test_a_killed_rank_under_srun_ends_both(hosts: Cable, run_file: Path, site: Path, tmp_path: Path) -> None:
    variables = {"PYTHONPATH": str(site), "STEP_S": "0.2"}
    jobs = srun(hosts, tmp_path, 2, str(run_file), "train.max_steps=10000", **variables)
    jobs[0].wait_for("step 2/", STARTED_WITHIN_S)
    ranks = [rank for job in jobs for rank in job.ranks()]
    assert len(ranks) == 4
    ranks[3].kill()
    all_end_within(ALL_END_WITHIN_S, ranks)
    said = (
        "rank 3 of 4 on hostB is gone: its process ended without giving a reason (killed, perhaps for want of memory?)"
    )
    assert [job.tells(said) for job in jobs] == [1, 0, 1, 0]  # one on each host
    assert "Traceback" not in "".join(job.said for job in jobs)


@pytest.mark.parametrize("rank", [more(3), more(0)])
def test_a_stopped_rank_is_named_on_both_hosts(
    rank: int, hosts: Cable, run_file: Path, site: Path, tmp_path: Path
) -> None:
    """Also rank 0, which would ask the others."""
    variables = {"PYTHONPATH": str(site), "STEP_S": "0.2"}
    jobs = srun(hosts, tmp_path, 2, str(run_file), "train.max_steps=10000", "parallel.timeout_s=3", **variables)
    jobs[0].wait_for("step 2/", STARTED_WITHIN_S)
    ranks = [rank for job in jobs for rank in job.ranks()]
    ranks[rank].suspend()
    all_end_within(ALL_END_WITHIN_S, [other for other in ranks if other is not ranks[rank]])
    said = rf"^rank {rank} of 4 on host{'AB'[rank // 2]} is late: no answer, so stopped or blocked\. rank"
    told = [len(re.findall(said, job.said, re.M)) for job in jobs]
    assert told == ([1, 0, 1, 0] if rank else [0, 1, 1, 0])
    for job in (job for job, count in zip(jobs, told, strict=True) if count):
        assert "in all_reduce\n" in job.said  # where it waits


@in_everything
def test_hosts_that_do_not_agree_end_before_they_start(hosts: Cable, run_file: Path) -> None:
    """Here they would make other groups, and wait for each other."""
    sizes = (2, 1)
    jobs = [
        host.start(*torchrun(hosts, host, 2, str(run_file), f"parallel.tensor_parallel_size={size}"))
        for host, size in zip(hosts.hosts, sizes, strict=True)
    ]
    for job in jobs:
        job.wait_for("has the configuration", STARTED_WITHIN_S)
    for job in jobs:
        assert job.process.wait(timeout=ALL_END_WITHIN_S) != 0
        said = r"^rank [23] of 4 on hostB has the configuration 'tensor_parallel_size: 1', and rank 0 has '.*: 2'$"
        assert len(re.findall(said, job.said, re.M)) == 1, job.said
