"""How numbers are written: against what Python's own formats say, and the limits between units."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_kv.utilities.formatting import format_bytes, percent

UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@given(st.integers(0, 2**45))
def test_bytes_can_be_read_back_to_three_digits(size):
    number, unit = format_bytes(size).split()
    assert abs(Fraction(number) * UNITS[unit] - size) <= Fraction(size, 180)
    assert unit in ("B", "GiB") or 0.9 < float(number) < 1000.5


@pytest.mark.parametrize(
    ("size", "shown"),
    [(0, "0 B"), (999, "999 B"), (343_000_000, "327 MiB"), (5.7e9, "5.31 GiB"), (80e9, "74.5 GiB")],
)
def test_bytes_as_people_see_them(size, shown):
    assert format_bytes(size) == shown


@pytest.mark.parametrize(
    ("share", "rough", "fine"),
    [
        (0, "0 %", "0.0 %"),
        (0.0123, "1.2 %", "1.2 %"),
        (0.262, "26 %", "26.2 %"),
        (1.5, "150 %", "150.0 %"),
    ],
)
def test_shares(share, rough, fine):
    assert (percent(share), percent(share, 1)) == (rough, fine) and fine == f"{share:.1%}".replace(
        "%", " %"
    )
