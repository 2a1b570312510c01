"""Capacity: the highest rate at which one server keeps its promise, and how many servers some traffic needs.

A Poisson stream of R requests/s dealt out at random to n servers is n Poisson streams of R / n: one server tells all.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from minivllm.errors import StartupError
from minivllm.simulate.metrics import Latency, Metrics

SLO_METRICS = ("ttft", "tpot", "itl", "e2e")
_PRECISION = 0.02
_LOWEST, _HIGHEST = 1e-3, 1e6  # requests per second


@dataclass(frozen=True, slots=True)
class SLO:
    """Limits in milliseconds on a percentile (50, 90 or 99) of TTFT, TPOT, ITL or E2E latency."""

    limits: dict[str, float]
    percentile: int = 99

    @classmethod
    def parse(cls, parts: tuple[str, ...], percentile: int) -> "SLO":
        """`("ttft:500", "tpot:60")`. Raises `ValueError`."""
        limits = {}
        for part in parts:
            name, _, limit = part.partition(":")
            if name not in SLO_METRICS:
                raise ValueError(f"slo must name {', '.join(SLO_METRICS)}, as in ttft:500,tpot:60; got {part!r}")
            try:
                limits[name] = float(limit)
            except ValueError:
                raise ValueError(f"slo {name} must be milliseconds, got {limit!r}") from None
            if not (math.isfinite(limits[name]) and limits[name] > 0):
                raise ValueError(f"slo {name} must be above 0 ms, got {limit}")
        return cls(limits, percentile)

    def violations(self, metrics: Metrics) -> list[str]:
        """What is not kept, with both numbers."""
        found = {name: self._value(getattr(metrics, name)) for name in self.limits}
        return [
            f"{name} p{self.percentile} {found[name]:.0f} > {limit:.0f} ms"
            for name, limit in self.limits.items()
            if found[name] > limit
        ]

    def _value(self, latency: Latency) -> float:
        value: float = getattr(latency, f"p{self.percentile}")
        return value

    def __str__(self) -> str:
        return ", ".join(f"{name} p{self.percentile} ≤ {limit:g} ms" for name, limit in self.limits.items())


@dataclass(frozen=True, slots=True)
class Probe:
    """One simulated rate."""

    rate: float
    metrics: Metrics
    violations: list[str]


def find_rate(simulate: Callable[[float], Metrics], slo: SLO, start: float = 1.0) -> list[Probe]:
    """Probes in the order they were made; the last is the highest rate found that keeps `slo`, within 2 %.

    Raises `StartupError` when no rate does, or any.
    """
    probes: list[Probe] = []

    def keeps(rate: float) -> bool:
        metrics = simulate(rate)
        probes.append(Probe(rate, metrics, slo.violations(metrics)))
        return not probes[-1].violations

    low = high = start
    if keeps(start):
        while keeps(high := 2 * low):
            low = high
            if low > _HIGHEST:
                raise StartupError(f"{slo} is kept at any rate: raise --num-requests, or choose a stricter one")
    else:
        while not keeps(low := high / 2):
            high = low
            if low < _LOWEST:
                raise StartupError(f"{slo} cannot be kept even without load: {probes[-1].violations[0]}")
    while high / low > 1 + _PRECISION:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if keeps(middle) else (low, middle)
    best = max((probe for probe in probes if not probe.violations), key=lambda probe: probe.rate)
    return [*(probe for probe in probes if probe is not best), best]


def num_servers(traffic: float, rate_per_server: float) -> int:
    """Servers for `traffic` requests per second."""
    return math.ceil(traffic / rate_per_server)
