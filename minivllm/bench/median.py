"""The run in the middle: all numbers that are shown together are of one run."""

from collections.abc import Callable, Sequence
from statistics import median_low
from typing import TypeVar

RunT = TypeVar("RunT")


def median_run(runs: Sequence[RunT], key: Callable[[RunT], float]) -> RunT:
    """The run with the median `key`; of an even number of runs, that with the lower one of the middle two."""
    middle = median_low(map(key, runs))
    return next(run for run in runs if key(run) == middle)
