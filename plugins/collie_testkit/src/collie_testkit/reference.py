"""The page docs/checks.md, from the checks themselves."""

from __future__ import annotations

from collections.abc import Iterable

from collie_testkit.registry import KINDS, LEVELS, Check, checks_of

_HEAD = """\
# The checks

What `collie check` and `checks(...)` demand of a plugin, weaker checks first. `make docs` writes this page from the
code of `collie-testkit`; [testkit.md](testkit.md) says how to use it."""


def checks_page() -> str:
    """docs/checks.md."""
    sections = [_HEAD, _section("Every plugin", [check for check in checks_of("model") if not check.kinds])]
    sections += [_section(f"{kind} plugins".capitalize(), [c for c in checks_of(kind) if c.kinds]) for kind in KINDS]
    return "\n\n".join(sections) + "\n"


def _section(title: str, checks: Iterable[Check]) -> str:
    rows = [f"| `{check.name}` | {check.level} {LEVELS[check.level]} | {check.demand} |" for check in checks]
    return "\n".join([f"## {title}", "", "| check | level | what it demands |", "|---|---|---|", *rows])


if __name__ == "__main__":
    print(checks_page(), end="")
