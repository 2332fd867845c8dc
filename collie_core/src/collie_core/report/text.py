"""Numbers and texts as a person reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Segments = Sequence[tuple[str, bool]]
"""The pieces of one sample and whether each is a target of the loss."""

NONE = "-"  # where a number is missing


def count(value: float) -> str:
    """9,999 in full, then 12.3 k, 1.06 M, 7.24 B, 1.4 T: three digits that count."""
    if abs(value) < 10_000:
        return f"{value:,.0f}"
    for unit, size in (("k", 1e3), ("M", 1e6), ("B", 1e9), ("T", 1e12)):
        if abs(value) < 999.5 * size or unit == "T":
            break
    return f"{three_digits(value / size)} {unit}"


def three_digits(value: float) -> str:
    """1.23, 12.3, 123."""
    return f"{value:.{2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0}f}"


def memory(size: float | None) -> str:
    """Bytes in binary units: 512 MiB, 1.25 GiB."""
    if not _is_number(size):
        return NONE
    value = float(size)  # type: ignore[arg-type]
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1023.5:
            return f"{value:.0f} {unit}" if unit in ("B", "KiB", "MiB") else f"{three_digits(value)} {unit}"
        value /= 1024
    return f"{three_digits(value)} TiB"


def duration(seconds: float) -> str:
    """0.4 s, 48 s, 3 min 20 s, 2 h 05 min, 1 d 4 h."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    if total < 86_400:
        return f"{total // 3600} h {total % 3600 // 60:02d} min"
    return f"{total // 86_400} d {total % 86_400 // 3600} h"


def loss(value: float | None) -> str:
    """Four significant digits; a loss that is no number says so."""
    if value is None:
        return "nan"
    return f"{value:.4g}" if not 0.001 <= abs(value) < 1000 else f"{value:#.4g}".rstrip(".")


def learning_rate(value: float | None) -> str:
    """3.00e-04."""
    return NONE if value is None else f"{value:.2e}"


def rate(value: float | None) -> str:
    """Tokens per second, no unit: 812, 12.3 k."""
    return count(value) if _is_number(value) else NONE  # type: ignore[arg-type]


def results(values: Mapping[str, Any]) -> str:
    """Evaluation results in one line: `eval/perplexity` becomes "perplexity 3.210"."""
    return "  ".join(f"{name.removeprefix('eval/')} {loss(value)}" for name, value in values.items())


def best(found: Mapping[str, Any]) -> str:
    """The best evaluation: eval/perplexity 3.210 at step 40."""
    return f"{found['metric']} {loss(found['value'])} at step {found['step']}"


def change(value: float, before: float | None) -> str:
    """+0.12 or -1.5e-05: three digits of a difference, with its sign; "" where there is none to give."""
    if not (_is_number(value) and _is_number(before)):
        return ""
    return f"{value - before:+.3g}"  # type: ignore[operator]


def printable(text: str) -> str:
    """`text` without the control characters that would move the cursor or colour the terminal."""
    return "".join(char if char in "\n\t" or char.isprintable() else repr(char)[1:-1] for char in text)


def one_line(text: str, limit: int) -> str:
    """`text` with its line ends written as ⏎, and its middle left out when it is longer than `limit`."""
    return _without_middle(printable(text).replace("\n", "⏎"), limit)


def shortened(segments: Segments, limit: int = 800) -> list[tuple[str, bool]]:
    """Each piece with its middle left out when it is longer than `limit` characters; at most 16 pieces."""
    pieces = [(_without_middle(printable(text), limit), target) for text, target in segments]
    if len(pieces) > 16:
        pieces = [*pieces[:8], ("\n[…]\n", False), *pieces[-7:]]
    return pieces


def _without_middle(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]} […{len(text) - 2 * half:,} characters…] {text[-half:]}"


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
