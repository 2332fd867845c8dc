"""Running checks, and what came out of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from collie_core.api import PluginError, Plugins
from collie_testkit.context import Context, Material, Shared
from collie_testkit.registry import KINDS, Check, Failed, Skipped, checks_of
from collie_testkit.zygote import Zygote

PASSED, FAILED, SKIPPED, KNOWN = "passed", "failed", "skipped", "known failure"


@dataclass(frozen=True)
class Result:
    """How one check ended; `reason` says why it failed or was skipped."""

    check: Check
    outcome: str  # one of the above
    reason: str = ""
    error: Exception | None = None  # what the plugin raised


def checks_for(plugins: Plugins, kind: str, name: str) -> list[Check]:
    """The checks that the capabilities of a plugin choose; of one that cannot be described, those of its package."""
    found = checks_of(kind)
    try:
        can = plugins.component(kind, name).can
    except PluginError:
        return [check for check in found if check.level == 0]
    return [check for check in found if check.concerns(can)]


def run_check(check: Check, context: Context, known_failures: Mapping[str, str] | None = None) -> Result:
    """Run one check. A known failure that passes has failed: its reason no longer holds."""
    result = _run(check, context)
    reason = (known_failures or {}).get(check.name)
    if reason is None or result.outcome == SKIPPED:
        return result
    if result.outcome == PASSED:
        return Result(check, FAILED, f"passes, though it is a known failure ({reason}): take it off that list")
    return Result(check, KNOWN, reason)


def _run(check: Check, context: Context) -> Result:
    try:
        check.run(context)
    except Skipped as reason:
        return Result(check, SKIPPED, str(reason))
    except Failed as fault:
        return Result(check, FAILED, str(fault))
    except Exception as error:  # noqa: BLE001  (whatever a plugin raises, it has failed)
        return Result(check, FAILED, f"{type(error).__name__}: {error}", error)
    return Result(check, PASSED)


def run_all(kind: str, name: str, material: Material, known: Mapping[str, str], level: int) -> Iterator[Result]:
    """Every check of a plugin up to a level, without pytest.

    Raises:
        PluginError: there is no such plugin, or a known failure has no reason or names no check.
    """
    plugins = Plugins.discover()
    if kind not in (kinds := sorted({entry.kind for entry in plugins.entries})):
        raise PluginError(f"unknown kind {kind!r}; the kinds are {', '.join(kinds)}")
    plugins.find(kind, name)
    chosen = checks_for(plugins, kind, name)
    require_reasons(known, kind)
    with TemporaryDirectory(prefix="collie-check-") as root, Forks() as forks:
        shared = Shared(Path(root) / "shared")
        shared.folder.mkdir()
        for check in (found for found in chosen if found.level <= level):
            folder = Path(root) / check.name
            folder.mkdir()
            yield run_check(check, Context(kind, name, folder, forks.zygote, material, plugins, shared), known)


class Forks:
    """A zygote that is made when the first check asks for it."""

    def __init__(self) -> None:
        self._zygote: Zygote | None = None

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: object) -> None:
        if self._zygote is not None:
            self._zygote.__exit__()

    def zygote(self) -> Zygote:
        """The one."""
        self._zygote = self._zygote or Zygote()
        return self._zygote


def require_reasons(known: Mapping[str, str], kind: str) -> None:
    """Refuse known failures without a reason, and names that no check has.

    Raises:
        PluginError: there is one, or the kind is none.
    """
    names = [check.name for check in checks_of(kind)]
    for name, reason in known.items():
        if name not in names:
            raise PluginError(f"known failure {name!r} is no check of {kind} plugins; these are {', '.join(names)}")
        if not reason.strip():
            raise PluginError(f"known failure {name!r} has no reason: write why the check fails")


def own_checks(kind: str) -> str:
    """A line for kinds that have no checks of their own; "" for the others."""
    return "" if kind in KINDS else f"There are no checks of {kind} plugins beside those of the package."
