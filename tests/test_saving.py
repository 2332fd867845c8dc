"""How checkpoints come to the disk: behind the training, and what happens when there is no room."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from runs import Record, Sections, changed, sections_on
from topologies import world_size_of

from collie_core.api import CollieError, RunConfig, Trainer
from collie_core.checkpoint import files
from collie_core.checkpoint.saving import HostFile

STEPS = 6


def sections(topology: str, model: Path, data: Path, output: Path, **changes: Any) -> Sections:
    found = sections_on(topology, model, data, output, steps=STEPS, micro_batch=4)
    found["data"]["cache_dir"] = str(output.with_name("cache"))
    found["optimizer"] = {"type": "adamw", "lr": 1e-2}
    found["checkpoint"] = {"save_steps": 2}
    return changed(found, {key.replace("__", "."): value for key, value in changes.items()})


def contents(folder: Path) -> dict[str, bytes]:
    others = ("manifest.json", "config.yaml", "trainer.json")  # they differ by times and by the name of the folder
    kept = (path for path in folder.rglob("*") if path.is_file() and path.name not in others)
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


def test_the_training_goes_on_while_a_checkpoint_is_written(
    tiny_llama: Path, instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is held until two more steps are done; what it gets then is what there was when it was asked for."""
    plain = sections("dp1", tiny_llama, instructions, tmp_path / "plain", checkpoint__asynchronous=False)
    Trainer(RunConfig(**plain)).train()
    may_write, to_disk = threading.Event(), HostFile.to_disk
    alive: list[int] = []

    def held(file: HostFile) -> str:
        assert may_write.wait(60)
        return to_disk(file)

    class Gate:
        saved: ClassVar[list[str]] = []

        def collie_after_step(self, run: Any) -> None:
            alive.append(sum(thread.name == "collie-checkpoint" for thread in threading.enumerate()))
            if run.step == 3:
                assert not files.checkpoints_in(folder)  # step 3 is done, and that of step 2 waits for the disk
            may_write.set() if run.step == 4 else may_write.clear()
            if run.step == STEPS:
                may_write.set()

        def collie_checkpoint_saved(self, run: Any, path: Path) -> None:
            self.saved.append(path.parent.name)

    monkeypatch.setattr(HostFile, "to_disk", held)
    own = sections("dp1", tiny_llama, instructions, tmp_path / "behind")
    folder = tmp_path / "behind" / "run" / "checkpoints"
    Trainer(RunConfig(**own), callbacks=[Gate()]).train()
    assert alive[2] == alive[3] == 1
    assert max(alive) == 1
    steps = ["step-00000006", "step-00000004", "step-00000002"]
    assert [path.name for path in files.checkpoints_in(folder)] == steps
    assert [name for name in Gate.saved if name in steps] == steps[::-1]
    for path in files.checkpoints_in(folder):
        files.verify(path)
        assert contents(path) == contents(tmp_path / "plain" / "run" / "checkpoints" / path.name)


def test_without_memory_for_a_copy_the_training_waits(
    tiny_llama: Path, instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr("collie_core.checkpoint.saving.SPARE", 1 << 60)
    Trainer(RunConfig(**sections("dp1", tiny_llama, instructions, tmp_path))).train()
    assert "too few for a copy of optimizer.safetensors" in caplog.text
    assert [files.verify(path).step for path in files.checkpoints_in(tmp_path / "run" / "checkpoints")] == [6, 4, 2]


def test_the_best_step_is_never_deleted(tiny_llama: Path, instructions: Path, tmp_path: Path) -> None:
    class Worse:
        """Results that are best at step 2."""

        def collie_before_step(self, run: Any) -> None:
            assert run.best.get("step", 2) == 2

    own = sections("dp1", tiny_llama, instructions, tmp_path, checkpoint__save_total_limit=1)
    own["evaluation"] = {"steps": 2, "best": {"metric": "eval/number", "mode": "max"}}
    own["data"]["eval"] = str(instructions)
    numbers = iter([9.0, 3.0, 1.0, 0.0])
    trainer = Trainer(RunConfig(**own), eval_fn=lambda *_: {"number": next(numbers)}, callbacks=[Worse()])
    trainer.train()
    kept = [path.name for path in files.checkpoints_in(tmp_path / "run" / "checkpoints")]
    assert kept == ["step-00000006", "step-00000002"]


# -- no room ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB, which holds a run and two of its checkpoints."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system of limited size")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


class Disk:
    """Makes a file system unusable after a step, and usable again after another."""

    def __init__(self, folder: Path, how: str, begin: int, end: int) -> None:
        self.folder, self.how, self.steps = folder, how, (begin, end)

    def collie_after_step(self, run: Any) -> None:
        if int(os.environ.get("RANK", "0")) or run.step not in self.steps:
            return
        is_on = run.step == self.steps[0]
        if self.how == "full":
            filler = self.folder / "filler"
            if is_on:
                with filler.open("wb", buffering=0) as file:
                    free = os.statvfs(self.folder).f_bavail * os.statvfs(self.folder).f_frsize
                    file.write(bytes(free - 4096))
            else:
                filler.unlink()
        elif self.how == "gone":
            place = self.folder / "run" / "checkpoints"
            if is_on:
                place.rename(self.folder / "elsewhere")
                place.symlink_to("/nowhere/at/all")
            else:
                place.unlink()
                (self.folder / "elsewhere").rename(place)
        else:
            for step in range(50):  # a checkpoint may be on its way
                mode = "ro" if is_on else "rw"
                command = ["mount", "-o", f"remount,{mode}", str(self.folder)]
                if not subprocess.run(command, check=False, capture_output=True).returncode:
                    break
                threading.Event().wait(0.1)
                assert step < 49


def on_a_bad_disk(own: Sections, folder: Path, how: str, begin: int, end: int) -> tuple[list[float], str, str]:
    """Losses, what was raised, and what was logged."""
    told: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())

    record, handler = Record(), Keep(level=logging.WARNING)
    logging.getLogger("collie").addHandler(handler)
    raised = ""
    try:
        Trainer(RunConfig(**own), callbacks=[record, Disk(folder, how, begin, end)]).train()
    except CollieError as error:
        raised = str(error)
    finally:
        logging.getLogger("collie").removeHandler(handler)
    return record.losses, raised, "\n".join(told)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("topology", "how", "asynchronous", "because"),
    [
        ("dp1", "full", True, "No space left on device"),
        ("dp2", "full", False, "No space left on device"),
        ("tp2", "full", True, "No space left on device"),
        ("dp1", "gone", True, "File exists"),
    ],
)
def test_a_run_survives_a_disk_that_it_cannot_write_to(
    topology: str,
    how: str,
    asynchronous: bool,
    because: str,
    tiny_llama: Path,
    instructions: Path,
    tmp_path: Path,
    small_disk: Path,
    zygote: Any,
) -> None:
    own = sections(topology, tiny_llama, instructions, small_disk, checkpoint__asynchronous=asynchronous)
    own["data"]["cache_dir"], own["checkpoint"]["save_total_limit"] = str(tmp_path / "cache"), 2
    size, folder = world_size_of(topology), small_disk / "run" / "checkpoints"

    stops = {**own, "checkpoint": {**own["checkpoint"], "on_error": "stop"}}
    ranks = zygote.run(__file__, "on_a_bad_disk", world_size=size, args=(stops, small_disk, how, 3, 99))
    for losses, raised, _ in ranks:
        assert len(losses) in (4, 5)
        assert raised.startswith("a checkpoint cannot be written" if "model" not in raised else "the model cannot")
        assert because in raised
        assert "\n" not in raised
    if how == "full":
        (small_disk / "filler").unlink()
    else:
        folder.unlink()
        (small_disk / "elsewhere").rename(folder)
    assert [files.verify(path).step for path in files.checkpoints_in(folder)] == [2]
    assert len(list(folder.iterdir())) == 1

    goes_on = changed(own, {"checkpoint.on_error": "continue", "checkpoint.resume_from_checkpoint": "auto"})
    ranks = zygote.run(__file__, "on_a_bad_disk", world_size=size, args=(goes_on, small_disk, how, 3, 5))
    losses, raised, told = ranks[0]
    assert not raised
    assert len(losses) == STEPS - 2
    assert "the training goes on, and" in told
    assert because in told
    assert [files.verify(path).step for path in files.checkpoints_in(folder)] == [6, 2]
    rows = [json.loads(line)["step"] for line in (small_disk / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(1, STEPS + 1))  # those that found no room came later


def test_a_folder_that_becomes_read_only(
    tiny_llama: Path, instructions: Path, tmp_path: Path, small_disk: Path, zygote: Any
) -> None:
    """The whole file system: files that are open for writing are closed first, as the mount must be idle for this."""
    own = sections("dp1", tiny_llama, instructions, small_disk, checkpoint__on_error="continue")
    own["data"]["cache_dir"], own["train"]["output_dir"] = str(tmp_path / "cache"), str(tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(small_disk)
    ((losses, raised, told),) = zygote.run(
        __file__, "on_a_bad_disk", world_size=1, args=(own, small_disk, "read-only", 3, 5)
    )
    assert not raised
    assert len(losses) == STEPS
    assert "Read-only file system" in told
    assert [files.verify(path).step for path in files.checkpoints_in(small_disk)] == [6, 2]
