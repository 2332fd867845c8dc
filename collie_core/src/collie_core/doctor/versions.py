"""What is installed, whether it is what the packs ask for, and versions that are known not to work."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import metadata
from typing import NamedTuple

from packaging.requirements import Requirement

from collie_core.doctor.finding import Finding, Level, error, ok

SHOWN = ("torch", "transformers", "deepspeed", "peft", "accelerate", "datasets", "bitsandbytes")


class Bad(NamedTuple):
    """Versions that do not work, alone or together."""

    versions: tuple[str, ...]
    level: Level
    what: str
    way_out: str
    source: str


KNOWN_BAD = (
    Bad(
        ("deepspeed>=0.17.6,<0.18.3",),
        "error",
        "ZeRO-2 computes wrong gradients",
        "pip install -U deepspeed",
        "https://github.com/deepspeedai/DeepSpeed/issues/7718",
    ),
    Bad(
        ("deepspeed>=0.19,<0.19.8",),
        "error",
        "gradients that are not numbers are applied",
        "pip install -U deepspeed",
        "https://github.com/deepspeedai/DeepSpeed/pull/8035",
    ),
    Bad(
        ("deepspeed<0.14.1", "torch>=2.4"),
        "error",
        "deepspeed cannot be imported: it wants a name that torch has renamed",
        "pip install -U deepspeed",
        "https://github.com/deepspeedai/DeepSpeed/issues/5337",
    ),
    Bad(
        ("peft<0.18", "transformers>=5"),
        "error",
        "peft cannot be imported: it wants HybridCache, which transformers no longer has",
        "pip install -U peft",
        "https://github.com/huggingface/peft/issues/3333",
    ),
    Bad(
        ("peft<0.19", "transformers>=5.17"),
        "warning",
        "transformers' own loading of adapters imports a function that this peft lacks",
        "pip install -U peft",
        "https://github.com/huggingface/transformers/pull/46605",
    ),
    Bad(
        ("transformers<5", "huggingface-hub>=1"),
        "error",
        "transformers refuses this huggingface-hub when it is imported",
        "pip install -U transformers",
        "https://github.com/pytorch/executorch/pull/15398",
    ),
    Bad(
        ("torch<2.3", "numpy>=2"),
        "error",
        "torch was built for NumPy 1 and cannot exchange arrays with this one",
        "pip install -U torch",
        "https://github.com/pytorch/pytorch/issues/107302",
    ),
    Bad(
        ("bitsandbytes<0.45", "triton>=3.2"),
        "error",
        "bitsandbytes cannot be imported: it wants triton.ops, which triton no longer has",
        "pip install -U bitsandbytes",
        "https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1492",
    ),
    Bad(
        ("nvidia-nccl-cu12==2.29.2",),
        "error",
        "this NCCL can hang; 2.29.3 repairs it",
        "pip install -U nvidia-nccl-cu12",
        "https://github.com/pytorch/pytorch/pull/174338",
    ),
)


def check() -> Iterator[Finding]:
    """The versions, requirements that are not met, and known trouble."""
    installed = {name: version for name in SHOWN if (version := version_of(name))}
    yield ok(f"python {platform.python_version()}, {_listed(installed)}")
    packs = sorted({dist.name: dist.version for dist in metadata.distributions() if _is_pack(dist.name)}.items())
    yield ok(_listed(dict(packs)))
    for pack, _ in packs:
        for unmet, found in unmet_requirements(pack):
            have = f"{found} is installed" if found else "it is not installed"
            yield error(f"{pack} requires {unmet}, and {have}", f"pip install '{unmet}'")
    for bad in KNOWN_BAD:
        if all(_is_installed(Requirement(text)) for text in bad.versions):
            have = _listed({name: version_of(name) or "" for name in (Requirement(text).name for text in bad.versions)})
            yield Finding(bad.level, f"{have}: {bad.what} ({bad.source})", bad.way_out)


def version_of(name: str) -> str | None:
    """Of an installed distribution; None: it is not."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def unmet_requirements(distribution: str) -> Iterator[tuple[str, str | None]]:
    """What it requires, without its extras, and has not; with the version that is installed instead."""
    for text in metadata.requires(distribution) or ():
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        if not _is_installed(requirement):
            yield f"{requirement.name}{requirement.specifier}", version_of(requirement.name)


def _is_installed(requirement: Requirement) -> bool:
    version = version_of(requirement.name)
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def _is_pack(name: str | None) -> bool:
    return name is not None and (name == "collie" or name.lower().replace("_", "-").startswith("collie-"))


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
