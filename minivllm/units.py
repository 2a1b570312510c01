"""Numbers for a reader: about three significant digits, in the unit that fits, on slow machines and on fast ones."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Unit(NamedTuple):
    """`size` is what one of it is in the base unit: 1e-3 for ms."""

    name: str
    size: float

    def text(self, value: float) -> str:
        """`value`, given in the base unit, without the unit's name."""
        return number(value / self.size)


TIME = (Unit("s", 1.0), Unit("ms", 1e-3), Unit("µs", 1e-6))
MEMORY = (Unit("GB", 1e9), Unit("MB", 1e6), Unit("kB", 1e3), Unit("bytes", 1.0))
BANDWIDTH = (Unit("TB/s", 1e12), Unit("GB/s", 1e9), Unit("MB/s", 1e6))
ARITHMETIC = (Unit("TFLOP/s", 1e12), Unit("GFLOP/s", 1e9), Unit("MFLOP/s", 1e6))


def number(value: float, num_digits: int = 3) -> str:
    """`num_digits` significant digits, and never less than all before the point: 0.0123, 1.20, 1,234."""
    if not value or not math.isfinite(value):
        return f"{value:.0f}"
    exponent = int(f"{value:.{num_digits - 1}e}".partition("e")[2])  # after rounding: 9.999 is 10.0
    return f"{value:,.{max(0, num_digits - 1 - exponent)}f}"


def fitting(units: Sequence[Unit], values: Iterable[float]) -> Unit:
    """The unit, of `units` from large to small, for numbers that are shown together: the largest is at least 1."""
    largest = max(map(abs, values), default=0.0)
    return next((unit for unit in units if unit.size <= largest), units[-1])


def quantity(value: float, units: Sequence[Unit]) -> str:
    """`value`, given in the base unit, in the unit that fits it."""
    unit = fitting(units, [value])
    return f"{unit.text(value)} {unit.name}"


def duration(seconds: float) -> str:
    """1.02 s, 15.7 ms, 3.83 µs."""
    return quantity(seconds, TIME)
