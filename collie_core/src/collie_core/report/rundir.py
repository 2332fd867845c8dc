"""The run directory: taking it, and the files that say what ran."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collie_core.errors import RunError

if TYPE_CHECKING:
    from collie_core.config.run import RunConfig

CONFIG = "config.yaml"
PLUGINS = "plugins.json"
ENVIRONMENT = "environment.json"
SUMMARY = "summary.json"
PLAN = "plan.json"
METRICS = "metrics.jsonl"
CSV = "metrics.csv"
REPORT = "report.html"
TENSORBOARD = "tensorboard"
MODEL = "model"
BEST = "best"
BEST_FACTS = "best.json"  # in that folder, so that the number always belongs to the weights
CHECKPOINTS = "checkpoints"
PREDICTIONS = "predictions"

HEADER = "# Written by CoLLiE: the configuration of this run, everything resolved.\n"

_EXPORT = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "collie_adapter.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "README.md",
)

# What CoLLiE writes, as patterns below the run directory. Overwriting a run removes these and nothing else.
OWN_FILES = (
    PLUGINS,
    ENVIRONMENT,
    SUMMARY,
    PLAN,
    METRICS,
    CSV,
    REPORT,
    f"{TENSORBOARD}/events.out.tfevents.*",
    f"{BEST}/{BEST_FACTS}",
    *(f"{folder}/{file}" for folder in (MODEL, BEST) for file in _EXPORT),
    f"{PREDICTIONS}/*.jsonl",
    f"{PREDICTIONS}/*.details.json",
)
OWN_FOLDERS = (f"{CHECKPOINTS}/step-*", f"{CHECKPOINTS}/.step-*")


def refuse_used_directory(config: RunConfig, *, may_replace: bool | None = None) -> None:
    """Check that the run may write to its output folder; changes nothing.

    Args:
        may_replace: whether it may where a run is already, as the one that resumes; None: as
            `train.overwrite_output_dir` says.

    Raises:
        RunError: the folder holds a run that may not be replaced, or it is not a folder, or its config.yaml is somebody
            else's.
    """
    output_dir = Path(config.train.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise RunError(f"train.output_dir={output_dir} is a file; name a folder")
    found = [name for name in (METRICS, CONFIG) if (output_dir / name).exists()]
    if not found:
        return
    if not (config.train.overwrite_output_dir if may_replace is None else may_replace):
        raise RunError(
            f"train.output_dir={output_dir} already holds a run ({', '.join(found)}); choose another folder, "
            "or set train.overwrite_output_dir=true to replace it"
        )
    if CONFIG in found and not _is_ours(output_dir / CONFIG):
        raise RunError(
            f"{output_dir / CONFIG} was not written by CoLLiE and would be overwritten; choose another train.output_dir"
        )


def prepare_run_directory(
    config: RunConfig,
    registry_table: Sequence[Mapping[str, str]],
    *,
    may_replace: bool | None = None,
    continues: int | None = None,
) -> Path:
    """Take the output folder and write config.yaml, plugins.json and environment.json into it.

    Args:
        registry_table: the plugins in use: kind, name, distribution, version, value.
        may_replace: see `refuse_used_directory`.
        continues: the step up to which the record in the folder stays, of a run that resumes; None: nothing stays.

    Raises:
        RunError: see `refuse_used_directory`; or the folder cannot be written.
    """
    refuse_used_directory(config, may_replace=may_replace)
    output_dir = Path(config.train.output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        if continues is None:
            _remove_own_files(output_dir)
        else:
            _cut_record(output_dir, continues)
        _replace(output_dir / CONFIG, [HEADER + config.to_yaml()])  # cut short, it would no longer be known as ours
        write_json(output_dir / PLUGINS, list(registry_table))
        write_json(output_dir / ENVIRONMENT, environment())
    except OSError as error:
        raise RunError(f"train.output_dir={output_dir} cannot be written: {error}") from error
    return output_dir


def is_unfinished(output_dir: Path) -> bool:
    """Whether a run of ours has begun in a folder and has left neither a model nor a checkpoint."""
    left = (
        output_dir / MODEL,
        output_dir / BEST,
        *(path for name in OWN_FOLDERS[:1] for path in output_dir.glob(name)),
    )
    return (output_dir / CONFIG).is_file() and _is_ours(output_dir / CONFIG) and not any(path.exists() for path in left)


def _cut_record(output_dir: Path, step: int) -> None:
    """Leave the rows up to a step; what was written after it, or only in part, will be written again."""
    metrics, table = output_dir / METRICS, output_dir / CSV
    if metrics.is_file():
        lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        _replace(metrics, [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= step])
    if table.is_file():
        lines = table.read_text(encoding="utf-8").splitlines(keepends=True)
        columns = [line.rstrip("\n").split(",") for line in lines]  # numbers, and names without commas
        place = columns[0].index("step") if columns and "step" in columns[0] else 0
        whole = [len(row) == len(columns[0]) and lines[at].endswith("\n") for at, row in enumerate(columns)]
        kept = [line for at, line in enumerate(lines) if at == 0 or (whole[at] and float(columns[at][place]) <= step)]
        _replace(table, kept)


def _replace(path: Path, lines: Sequence[str]) -> None:
    beside = path.with_name(f"{path.name}.new")
    beside.write_text("".join(lines), encoding="utf-8")
    os.replace(beside, path)


def run_identity(config: RunConfig) -> dict[str, str]:
    """What must be the same on every rank for their numbers to belong together."""
    versions = {name: metadata.version(name) for name in ("collie-core", "torch", "transformers")}
    return {"the configuration": config.to_yaml(), **versions}


def write_json(path: Path, value: Any) -> None:
    """Indented, strict JSON. What JSON does not know is written as text."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=str)
    path.write_text(text + "\n", encoding="utf-8")


def environment() -> dict[str, Any]:
    """What one needs to repeat the run elsewhere; no environment variables, secrets in the command masked."""
    return {
        "command": list(redacted(sys.argv)),
        "working_directory": os.getcwd(),
        "git": git_state(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "gpus": _gpus(),
        "packages": _packages(),
    }


def redacted(arguments: Sequence[str]) -> Iterator[str]:
    """Command-line arguments, with the values of keys that sound secret and passwords in URLs masked."""
    secret_follows = False
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        is_secret = bool(_SECRET.search(key)) and (bool(equals) or key.startswith("-"))
        if secret_follows:
            yield "***"
        elif is_secret and equals:
            yield f"{key}=***"
        else:
            yield _URL_PASSWORD.sub(r"\1***@", argument)
        secret_follows = is_secret and not equals


_SECRET = re.compile(r"(^|[._-])(api_?key|token|secret|password|passwd|credentials?)$", re.IGNORECASE)
_URL_PASSWORD = re.compile(r"(\w+://)[^/@\s]+@")


def git_state(folder: Path | None = None) -> dict[str, Any] | None:
    """Commit of the working directory and whether files differ from it; None outside a repository."""
    try:
        commit = _git("rev-parse", "HEAD", cwd=folder)
        changed = bool(_git("status", "--porcelain", "--untracked-files=no", cwd=folder))
    except (OSError, subprocess.SubprocessError):  # no git, no repository, no commit, or one too large to ask
        return None
    return {"commit": commit, "changed": changed}


def _git(*arguments: str, cwd: Path | None) -> str:
    done = subprocess.run(
        ["git", *arguments],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=10,
        check=True,
    )
    return done.stdout.strip()


def _cpu() -> dict[str, Any]:
    import psutil  # type: ignore[import-untyped]

    return {
        "model": _cpu_model(),
        "cores": psutil.cpu_count(logical=True),
        "memory_bytes": psutil.virtual_memory().total,
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")  # where platform.processor() says nothing: Linux
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return found.group(1)
    return platform.processor() or platform.machine()


def _gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [{"model": device.name, "memory_bytes": device.total_memory} for device in devices]


_HEADER = re.compile(r"^(Name|Version):[ \t]*(.+)$", re.MULTILINE)


def _packages() -> dict[str, str]:
    """Of two installations of one distribution, that which Python imports: the first on the path."""
    found: dict[str, str] = {}
    for item in metadata.distributions():
        text = item.read_text("METADATA") or item.read_text("PKG-INFO") or ""
        headers = dict(_HEADER.findall(text.partition("\n\n")[0]))  # a parser of mails takes ten times as long
        if "Name" in headers:
            found.setdefault(headers["Name"], headers.get("Version", ""))
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def _is_ours(path: Path) -> bool:
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.readline() == HEADER


def _remove_own_files(output_dir: Path) -> None:
    for pattern in OWN_FILES:
        for path in output_dir.glob(pattern):
            path.unlink()
    for pattern in OWN_FOLDERS:
        for path in output_dir.glob(pattern):
            shutil.rmtree(path)
    for folder in (TENSORBOARD, MODEL, BEST, CHECKPOINTS, PREDICTIONS):
        path = output_dir / folder
        if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
            path.rmdir()
