"""Numbers for a reader: digits and units."""

import pytest

from minivllm.units import ARITHMETIC, BANDWIDTH, MEMORY, TIME, duration, fitting, number, quantity


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.01234, "0.0123"),
        (0.9999, "1.00"),
        (1.2, "1.20"),
        (99.96, "100"),
        (-12.34, "-12.3"),
        (1234.5, "1,234"),
        (float("nan"), "nan"),
    ],
)
def test_three_significant_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_more_digits_on_demand() -> None:
    assert [number(value, 4) for value in (0.5, 12.345, 1234.5)] == ["0.5000", "12.35", "1,234"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(75.25, "75.2 s"), (0.0157, "15.7 ms"), (3.83e-6, "3.83 µs"), (2e-8, "0.0200 µs")]
)
def test_a_duration_has_the_unit_that_fits(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_quantities() -> None:
    assert quantity(776.719e12, ARITHMETIC) == "777 TFLOP/s"
    assert quantity(23.4e9, BANDWIDTH) == "23.4 GB/s"
    assert quantity(1_192_099_840, MEMORY) == "1.19 GB"


def test_what_is_shown_together_has_one_unit() -> None:
    unit = fitting(TIME, [0.102, 0.0239])
    assert (unit.name, unit.text(0.102), unit.text(0.0239)) == ("ms", "102", "23.9")
    assert fitting(TIME, []) == fitting(TIME, [0.0]) == TIME[-1]
