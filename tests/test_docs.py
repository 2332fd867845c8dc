"""README and docs are run: shell blocks as written, Python blocks as programs, files as files."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import preloaded
import pytest

ROOT = Path(__file__).resolve().parent.parent
# What a page lets a person type and is run in a shorter form, since what comes after it uses its model; other commands
# of make are not run here.
WHICH = "collie compare examples/quickstart.yaml --optimizers adamw,lion"
RATES = "--learning-rates lion=3e-4,1e-3"
FEW = "train.max_steps=5 train.num_train_epochs=null"
FINETUNE = "model.model_name_or_path=runs/quickstart/model data.max_length=256"
ADALOMO = "collie train examples/quickstart.yaml optimizer.type=adalomo optimizer.lr=1e-2 train.max_grad_norm=0"
SHORTER = {
    f"{WHICH},adalomo {RATES} --learning-rates adalomo=3e-3,1e-2 --output runs/which train.max_steps=100": (
        f"{WHICH} --learning-rates lion=1e-3 --output runs/which train.max_steps=2 data.max_length=32 evaluation={{}}"
    ),
    "make quickstart": "collie train examples/quickstart.yaml train.max_steps=8 evaluation.steps=null",
    f"collie train run.yaml {FINETUNE} optimizer.lr=1e-3": f"collie train run.yaml {FINETUNE} {FEW}",
    f"collie train lora.yaml {FINETUNE}": f"collie train lora.yaml {FINETUNE} {FEW}",
    f"{ADALOMO} train.max_steps=50 train.output_dir=runs/adalomo": f"{ADALOMO} train.max_steps=4 evaluation.steps=null",
}
PAGES = ["README.md", *(str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").rglob("*.md")))]
FENCE = re.compile(r"^```(\w+)(?: file=(\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, the file it stands for, if any, and its text."""

    language: str
    file: str | None
    text: str


def blocks(page: str) -> list[Block]:
    return [Block(*match.groups()) for match in FENCE.finditer((ROOT / page).read_text())]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with `collie` and `python` that have imported everything already; see `preloaded`."""
    folder = tmp_path_factory.mktemp("programs")
    command = [sys.executable, preloaded.__file__, str(folder / "socket"), str(folder)]
    with subprocess.Popen(command, env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}) as server:
        while not (folder / "socket").exists():
            assert server.poll() is None
            time.sleep(0.1)
        yield folder
        server.terminate()


def environment(workspace: Path, programs: Path) -> dict[str, str]:
    """A person's shell: the tools of this environment first, plugins of the page found, no network."""
    binaries = Path(sys.executable).parent
    # Not what DeepSpeed has left in this process.
    return {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"} | {
        "PATH": os.pathsep.join([str(programs), str(binaries), os.environ["PATH"]]),
        "PYTHONPATH": str(workspace / "site"),
        "PIP_TARGET": str(workspace / "site"),
        "PIP_NO_DEPS": "1",
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip reads this one inverted: no isolation, hatchling is here
        "XDG_CACHE_HOME": str(workspace / "cache"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


def write_files(blocks: list[Block], workspace: Path) -> None:
    for block in blocks:
        if block.file is not None:
            target = workspace / block.file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(block.text)


def run(command: list[str] | str, workspace: Path, programs: Path) -> None:
    done = subprocess.run(
        command,
        shell=isinstance(command, str),
        cwd=workspace,
        env=environment(workspace, programs),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow
@pytest.mark.timeout(900)  # a page may have twenty commands
@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_the_page_runs(page: str, tmp_path: Path, programs: Path) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    for other in PAGES if page == "docs/plugins.md" else []:
        if other.startswith("docs/plugins/"):  # they show the parts of one package
            write_files(blocks(other), tmp_path)
    for block in blocks(page):
        if block.file is not None:
            write_files([block], tmp_path)
        elif block.language == "bash":
            for line in block.text.splitlines():
                command = SHORTER.get(line, "" if line.startswith("make ") else line)
                if command:
                    run(command, tmp_path, programs)
        elif block.language == "python":
            run([str(programs / "python"), "-c", block.text], tmp_path, programs)


@pytest.mark.parametrize("page", PAGES)
def test_blocks_say_what_they_are(page: str) -> None:
    known = {"bash", "python", "text", "json", "yaml", "toml", "console"}
    for block in blocks(page):
        assert block.language in known
        assert block.language not in ("json", "yaml", "toml") or block.file is not None


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text()):
        assert (ROOT / page).parent.joinpath(target).exists(), target
