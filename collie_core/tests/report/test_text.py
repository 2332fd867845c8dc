"""Numbers as a person reads them."""

from __future__ import annotations

import pytest

from collie_core.report import text


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"),
        (9_999, "9,999"),
        (12_345, "12.3 k"),
        (999_499, "999 k"),
        (999_600, "1.00 M"),
        (7.24e9, "7.24 B"),
    ],
)
def test_counts_keep_three_digits(value: float, expected: str) -> None:
    assert text.count(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0 B"),
        (512 * 2**20, "512 MiB"),
        (1023.9 * 2**20, "1.00 GiB"),
        (80 * 2**30, "80.0 GiB"),
        (None, "-"),
    ],
)
def test_memory_is_binary(value: float | None, expected: str) -> None:
    assert text.memory(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.04, "0.0 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (3599.6, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (100_800, "1 d 4 h"),
    ],
)
def test_durations_never_say_sixty(value: float, expected: str) -> None:
    assert text.duration(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1.23456, "1.235"),
        (0.5, "0.5000"),
        (123.456, "123.5"),
        (1e-5, "1e-05"),
        (12345.6, "1.235e+04"),
        (None, "nan"),
    ],
)
def test_losses_have_four_digits(value: float | None, expected: str) -> None:
    assert text.loss(value) == expected


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert text.printable("a\x1b[31mb\r\x07\n\tc") == "a\\x1b[31mb\\r\\x07\n\tc"


def test_long_samples_are_shown_by_their_ends() -> None:
    (piece, target), *_ = text.shortened([("a" * 5000 + "z", True)], limit=100)
    assert target
    assert piece.startswith("a" * 50)
    assert piece.endswith("z")
    assert "4,901 characters" in piece
    assert len(text.shortened([("x", False)] * 100)) == 16
