"""`collie doctor`: each check finds what is wrong, says so with a way out, and is silent where all is well."""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from packaging.requirements import Requirement

from collie_core.cli import doctor as verb
from collie_core.cli import main
from collie_core.doctor import devices, environment, files, interconnect, plugins, smoke, versions
from collie_core.doctor.finding import Finding, error, ok, warning
from collie_core.errors import RunError
from collie_core.parity import Record
from collie_core.plugins import Plugins


def levels(findings: Iterator[Finding]) -> list[str]:
    return [finding.level for finding in findings]


# -- versions -----------------------------------------------------------------------------------------------


def test_what_a_pack_requires_and_has_not_is_an_error(install: Any) -> None:
    install("collie-old", groups={}, requires=("torch>=1", "numpy>=99", "no-such-thing", "no-extra ; extra == 'x'"))
    found = [finding for finding in versions.check() if finding.what.startswith("collie-old requires")]
    assert [finding.what.partition(", and ")[0] for finding in found] == [
        "collie-old requires numpy>=99",
        "collie-old requires no-such-thing",
    ]
    assert found[0].way_out == "pip install 'numpy>=99'"


def test_each_known_bad_row_is_found_by_its_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    for bad in versions.KNOWN_BAD:
        have = {Requirement(text).name: _version_in(Requirement(text)) for text in bad.versions}
        monkeypatch.setattr(versions, "version_of", have.get)
        monkeypatch.setattr(versions, "_is_pack", lambda name: False)
        (found,) = [finding for finding in versions.check() if bad.source in finding.what]
        assert (found.level, found.way_out) == (bad.level, bad.way_out)
        assert bad.source.startswith("https://github.com/")


def _version_in(requirement: Requirement) -> str:
    candidates = ("0.13", "0.17.9", "0.18.2", "0.18.5", "0.19.3", "1.0", "2.0", "2.29.2", "2.5", "3.5", "4.57", "5.20")
    return next(version for version in candidates if requirement.specifier.contains(version))


def test_what_the_tests_run_on_is_not_known_to_be_bad() -> None:
    assert [finding for finding in versions.check() if "https://github.com/" in finding.what] == []


# -- devices ------------------------------------------------------------------------------------------------


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H100, 81559, 10, 570.1'\necho 'NVIDIA H100, 81559, 40000, 570.1'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


def test_gpus_are_listed_with_what_keeps_them_from_work(nvidia_smi: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.cuda", None)
    free, used, build = devices._gpus()
    assert (free.level, free.what) == ("ok", "GPU 0: NVIDIA H100, 79.6 GiB, driver 570.1")
    assert (used.level, "39.1 GiB are in use" in used.what) == ("warning", True)
    assert (build.level, "built for CPUs" in build.what) == ("warning", True)
    monkeypatch.setattr("torch.version.cuda", "12.8")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [*devices._gpus()][-1].level == "error"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert "may use 1 of 2" in [*devices._gpus()][-1].what


@pytest.mark.parametrize(
    ("script", "level", "says"),
    [
        ("echo 'NVIDIA GB10, [N/A], [N/A], 580.9'", "ok", "GPU 0: NVIDIA GB10, memory unknown, driver 580.9"),
        ("sleep 9", "warning", "nvidia-smi does not answer within 0.2 s"),
        ("echo 'Driver/library version mismatch'; exit 18", "warning", "exit code 18: Driver/library version mismatch"),
        ("echo 'No devices were found'; exit 6", "ok", "no GPU"),
    ],
)
def test_drivers_that_do_not_answer_as_they_should(
    script: str, level: str, says: str, tmp_path: Path, nvidia_smi: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    monkeypatch.setattr(devices, "_PATIENCE_S", 0.2 if "sleep" in script else 20)
    first = next(devices._gpus())
    assert (first.level, says in first.what) == (level, True)


def test_fewer_cores_than_there_are_threads_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "usable_cores", lambda: 1.5)
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (found,) = devices._processors()
    assert (found.level, found.way_out.partition(",")[0]) == ("warning", "export OMP_NUM_THREADS=1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert levels(devices._processors()) == ["ok"]


@pytest.mark.parametrize(
    "limits",
    [
        {"cpu.max": "50000 100000\n", "memory.max": "1048576\n"},
        {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000", "memory/memory.limit_in_bytes": "1048576"},
    ],
)
def test_what_a_container_allows(limits: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "CONTROL_GROUP", tmp_path)
    free = devices.usable_cores()
    for name, text in limits.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert devices.usable_cores() == 0.5 < free
    assert next(devices._memory()).what.startswith("1 MiB of memory, as the container allows")
    first = next(iter(limits))
    (tmp_path / first).write_text("max 100000" if first == "cpu.max" else "-1")
    assert devices.usable_cores() == free


# -- interconnect -------------------------------------------------------------------------------------------


@pytest.fixture
def no_process_group() -> None:
    """What a test before these has left behind in this process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def test_two_processes_exchange_and_are_measured(no_process_group: None) -> None:
    found = interconnect.run("gloo", 2)
    assert isinstance(found, dict)
    assert tuple(found) == interconnect.SIZES["gloo"]
    assert 0 < found[2**16] < found[2**24]


def test_processes_that_cannot_exchange_are_an_error(no_process_group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(interconnect.SIZES, "gloo", (-4,))
    found = interconnect.measured("gloo", 2)
    assert found.level == "error"
    assert "must be non-negative" in found.what
    monkeypatch.setattr(interconnect, "_seconds", lambda tensor: os._exit(1))
    monkeypatch.setitem(interconnect.SIZES, "gloo", (4,))
    assert "a process has died" in interconnect.measured("gloo", 2).what


def test_slow_gpus_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interconnect, "run", lambda backend, processes: {2**20: 1.0, 2**24: 0.01})
    slow = interconnect.measured("nccl", 4)
    assert (slow.level, "16 MiB at 1,678 MB/s" in slow.what) == ("warning", True)
    assert interconnect.measured("gloo", 2).level == "ok"
    monkeypatch.setattr(interconnect, "run", lambda backend, processes: "no answer within 60 s")
    assert "GLOO_SOCKET_IFNAME" in interconnect.measured("gloo", 2).way_out


# -- file systems -------------------------------------------------------------------------------------------


def test_a_good_place_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SLOW", 0.0)
    monkeypatch.setattr(files, "SLOW_SYNC_S", 60.0)
    (found,) = files.examined("temporary files", tmp_path / "not" / "there", 1)
    assert found.level == "ok"
    assert "MB/s" in found.what
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_and_one_that_cannot_be_written(tmp_path: Path) -> None:
    full = next(files.examined("runs", tmp_path, 2**60))
    assert (full.level, "free" in full.what, full.way_out) == ("warning", True, "make room, or choose another folder")
    (denied,) = files.examined("runs", Path("/proc/self/none"), 1)
    assert (denied.level, "cannot be written" in denied.what) == ("error", True)


def test_a_file_system_that_keeps_no_promise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Open:
        def __init__(self, path: str, timeout: float = -1) -> None:
            pass

        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr("filelock.FileLock", Open)
    monkeypatch.setattr(os, "replace", lambda first, second: None)
    monkeypatch.setattr(os, "rename", lambda first, second: None)
    found = [finding.what for finding in files.examined("runs", tmp_path, 1) if finding.level == "error"]
    assert [what.partition(": ")[2] for what in found] == [
        "locks do not keep others out",
        "a file cannot take the place of another at once",
        "folders cannot be renamed",
    ]


def test_places_that_do_not_suit(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = {"free": 9, "wanted": 1, "rate": 1e9, "sync_s": 0.001}
    assert [*files._complaints("runs", "ext4", **fast)] == []
    assert "lost" in next(files._complaints("runs", "tmpfs", **fast))[0]
    assert "data.cache_dir" in next(files._complaints("tokenised data", "nfs4", **fast))[1]
    assert "slow" in next(files._complaints("runs", "ext4", **fast | {"rate": 1e6}))[0]
    assert files.file_system(Path("/proc")) == "proc"


# -- environment --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "level", "says"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "error", "unset RANK WORLD_SIZE"),
        ({"OMP_NUM_THREADS": "4096"}, "warning", "export OMP_NUM_THREADS="),
        ({"CUDA_LAUNCH_BLOCKING": "1"}, "warning", "unset CUDA_LAUNCH_BLOCKING"),
        ({"TORCH_DISTRIBUTED_DEBUG": "DETAIL"}, "warning", "unset TORCH_DISTRIBUTED_DEBUG"),
        ({"HTTP_PROXY": "http://proxy:3128", "no_proxy": "example.org"}, "warning", "export no_proxy="),
        ({"TMPDIR": "/proc"}, "warning", "make it a folder that may be written"),
    ],
)
def test_variables_that_are_traps(variables: dict[str, str], level: str, says: str) -> None:
    (found,) = environment._variables(variables)
    assert found.level == level
    assert found.way_out.startswith(says)


def test_variables_that_are_none() -> None:
    harmless = {
        "OMP_NUM_THREADS": "1",
        "CUDA_LAUNCH_BLOCKING": "0",
        "http_proxy": "http://p:1",
        "no_proxy": "a,localhost",
        "TMPDIR": f"{tempfile.gettempdir()}/",
    }
    assert [*environment._variables(harmless)] == []


def test_limits_and_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {resource.RLIMIT_NOFILE: (256, 1024), resource.RLIMIT_AS: (2**30, -1)}
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits.get(which, (-1, -1)))
    few, small = environment._limits()
    assert (few.level, "administrator" in few.way_out, small.level) == ("warning", True, "error")
    limits = {resource.RLIMIT_NOFILE: (256, -1)}
    assert [finding.way_out for finding in environment._limits()] == ["ulimit -n 4096"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=2**26))
    (shm,) = environment._shared_memory()
    assert (shm.level, "64 MiB" in shm.what) == ("warning", True)


def test_a_lock_that_a_killed_compilation_has_left(tmp_path: Path) -> None:
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w"):  # it still compiles
        assert [*environment.stale_locks(tmp_path)] == []
    (found,) = environment.stale_locks(tmp_path)
    assert (found.level, found.way_out) == ("error", f"rm {lock}")


# -- plugins ------------------------------------------------------------------------------------------------


def test_broken_plugins_are_warned_of_and_broken_hooks_are_errors(
    install: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("collie-metre", groups={"collie.metric": {"metre": "no_such_module:X"}})
    install("collie-hooked", groups={"collie.hooks": {"hooked": "no_such_hooks"}})
    check, made = Plugins.check, ("collie-metre", "collie-hooked")  # importing all others takes seconds
    monkeypatch.setattr(Plugins, "check", lambda self, entry: entry.distribution in made and check(self, entry))
    found = {finding.way_out.rpartition("=")[2]: finding for finding in plugins.check() if finding.way_out}
    assert found["collie-metre"].level == "warning"
    assert found["collie-hooked"].level == "error"


# -- the smoke run ------------------------------------------------------------------------------------------


def test_two_processes_must_train_as_one() -> None:
    alone = Record([5.5, 5.4, 5.3], [1.0, 1.0, 1.0])
    assert smoke.compared(alone, Record([5.5, 5.4, 5.3 + 1e-7], [1.0, 1.0, 1.0])).level == "ok"
    other = smoke.compared(alone, Record([5.5, 5.4, 5.2], [1.0, 1.0, 1.0]))
    assert (other.level, "train otherwise than one" in other.what) == ("error", True)


def test_a_machine_that_cannot_reach_itself_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoke, "_train", lambda *_: pytest.fail("both would look for each other for minutes"))
    monkeypatch.setattr(smoke, "HERE", "203.0.113.1")  # an address that nobody has (RFC 5737)
    (found,) = smoke.check()
    assert (found.level, "cannot reach itself at 203.0.113.1" in found.what) == ("error", True)


def test_a_run_that_a_signal_has_ended_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoke, "record", lambda config, folder: (folder / "rank-00000.json").write_text(EMPTY))
    monkeypatch.setattr(smoke.starter, "start", lambda *_: 143)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    (found,) = smoke.check()
    assert (found.level, found.what) == ("error", "the smoke run fails: a signal ended it before it was done")


def test_a_run_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def fail(processes: int, arguments: list[str]) -> int:
        seen.update(os.environ)
        raise RunError("rank 1 of 2 was ended by SIGKILL")

    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(smoke, "record", lambda config, folder: (folder / "rank-00000.json").write_text(EMPTY))
    monkeypatch.setattr(smoke.starter, "start", fail)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    (found,) = smoke.check()
    assert (found.level, "SIGKILL" in found.what) == ("error", True)
    assert "RANK" not in seen
    assert (seen["CUDA_VISIBLE_DEVICES"], os.environ["RANK"]) == ("", "3")


EMPTY = json.dumps({"losses": [], "norms": [], "modules": {}, "gradients": {}, "stage": 0})


# -- the verb -----------------------------------------------------------------------------------------------


@pytest.fixture
def sections(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Finding]]:
    """What two checks find, instead of the real ones."""
    found: dict[str, list[Finding]] = {"first": [ok("fine")], "second": [warning("slow", "buy a faster one")]}
    for section in found:
        module = ModuleType(f"made_{section}")
        module.check = lambda section=section: iter(found[section])  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(verb, "SECTIONS", {section: f"made_{section}" for section in found})
    return found


def test_warnings_do_not_fail(sections: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    lines = ["first", "  ok       fine", "second", "  warning  slow", "           → buy a faster one"]
    assert capsys.readouterr().out.splitlines() == [*lines, "", "fit to train, with 1 warning"]


def test_an_error_fails_and_json_has_everything(sections: Any, capsys: pytest.CaptureFixture[str]) -> None:
    sections["first"].append(error("broken", "mend it"))
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out.endswith("NOT fit to train: 1 error and 1 warning\n")
    assert main(["doctor", "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert (said["fit"], said["errors"], said["warnings"]) == (False, 1, 1)
    assert said["findings"]["first"][1] == {"level": "error", "what": "broken", "way_out": "mend it"}


def test_a_check_that_cannot_go_on_is_an_error_and_the_others_follow(
    sections: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def check() -> Iterator[Finding]:
        yield ok("fine")
        raise FileNotFoundError("No usable temporary directory")

    monkeypatch.setattr(sys.modules["made_first"], "check", check)
    monkeypatch.setitem(verb.SECTIONS, "third", "no_such_module")
    assert main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["findings"]
    assert [one["level"] for one in found["first"]] == ["ok", "error"]
    assert found["first"][1]["what"] == "this cannot be examined: FileNotFoundError: No usable temporary directory"
    assert found["second"] == [{"level": "warning", "what": "slow", "way_out": "buy a faster one"}]
    assert "no_such_module" in found["third"][0]["what"]


def test_the_smoke_run_is_part_of_it() -> None:
    assert [*verb.SECTIONS.values()][-1] == smoke.__name__
