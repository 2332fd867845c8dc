"""Numeric match: the share of the answers with the right number, as GSM8K writes them (Cobbe et al. 2021)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal

from collie_metrics.samples import check_texts, share

# A number has digits of any script and may have a decimal point. "1,234" is one number, "1, 2" and "1,2" are two. A
# sign of currency may stand before it; what follows, as % or a unit, makes no difference: 50% is 50. A minus after a
# letter, a digit or a bracket is a hyphen or an operator: "10-5" ends in 5.
NUMBER = re.compile(
    r"""
    (?: (?<! [\w)\]%] ) (?P<minus> [-\N{MINUS SIGN}] ) )?
    (?: [$€£¥] \ ? )?
    (?P<digits> (?: \d{1,3} (?: ,\d{3} )+ (?! \d ) | \d+ ) (?: \.\d+ )? | \.\d+ )
    """,
    re.VERBOSE,
)
# Enough for any text: with Python's own limits a million digits would be an error.
CONTEXT = Context(prec=50, Emax=MAX_EMAX, Emin=MIN_EMIN, traps=[])


def number_in(text: str, marker: str | None = "####", require_marker: bool = False) -> Decimal | None:
    """The first number after the last marker; in a text without a marker, the last number."""
    _, found, answer = text.rpartition(marker) if marker else ("", "", text)
    if require_marker and not found:
        return None
    numbers = list(NUMBER.finditer(answer))
    if not numbers:
        return None
    match = numbers[0 if found else -1]
    value = Decimal(match["digits"].replace(",", ""))
    return value.copy_negate() if match["minus"] else value


def close(value: Decimal, wanted: Decimal, tolerance: float) -> bool:
    """Whether the two differ by at most `tolerance` times `wanted`; exact for 0."""
    if not tolerance or value == wanted:
        return value == wanted
    limit = CONTEXT.multiply(CONTEXT.create_decimal(repr(tolerance)), wanted.copy_abs())
    return CONTEXT.subtract(value, wanted).copy_abs() <= limit


class NumericMatch:
    """Three counts. Numbers are compared exactly: 5 is 5.0, and nothing is rounded."""

    def __init__(self, *, marker: str | None = "####", require_marker: bool = False, tolerance: float = 0.0) -> None:
        self.marker, self.require_marker, self.tolerance = marker, require_marker, tolerance
        self.right = self.answered = self.samples = 0

    def update(self, predictions: Sequence[str], targets: Sequence[Sequence[str]]) -> None:
        """Add samples, each with one or more references.

        Raises `ValueError` for lengths that differ, and for a sample without a number in any reference.
        """
        check_texts(predictions, targets)
        wanted = [self._wanted(index, references) for index, references in enumerate(targets)]
        for prediction, numbers in zip(predictions, wanted, strict=True):
            value = number_in(prediction, self.marker, self.require_marker)
            self.answered += value is not None
            self.right += value is not None and any(close(value, number, self.tolerance) for number in numbers)
        self.samples += len(targets)

    def merge(self, other: NumericMatch) -> None:
        """Add the samples of another rank."""
        self.right += other.right
        self.answered += other.answered
        self.samples += other.samples

    def compute(self) -> Mapping[str, float]:
        """`numeric_match`, and `numeric_match_answered`: the share that has a number at all; NaN without samples."""
        return {
            "numeric_match": share(self.right, self.samples),
            "numeric_match_answered": share(self.answered, self.samples),
        }

    def _wanted(self, index: int, references: Sequence[str]) -> list[Decimal]:
        found = [number_in(reference, self.marker) for reference in references]
        if numbers := [number for number in found if number is not None]:
            return numbers
        raise ValueError(f"targets[{index}]={references[0][-40:]!r} has no number: use another metric for such data")
