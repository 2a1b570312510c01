"""Turns samples into the numbers that are shown. Defined as in vLLM's `bench serve`:

TTFT     sending a request to its first event with output
ITL      between two successive events with output of a request, all gaps of all requests together
TPOT     of one request: (last event - first event) / (output tokens - 1)
E2E      sending a request to its last event with output
goodput  requests per second that meet every limit of the SLO
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from minivllm.bench.serving.messages import Sample

PERCENTILES = (50, 90, 95, 99)
SLO_METRICS = ("ttft", "tpot", "e2e")


@dataclass(frozen=True)
class Distribution:
    """Of a latency, in milliseconds. percentiles: by whole number (50 is the median)."""

    mean: float = 0.0
    max: float = 0.0
    percentiles: dict[int, float] = field(default_factory=lambda: dict.fromkeys(PERCENTILES, 0.0))

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Distribution":
        if not seconds:
            return cls()
        values = sorted(1000 * value for value in seconds)
        return cls(statistics.fmean(values), values[-1], {p: percentile(values, p) for p in PERCENTILES})


@dataclass(frozen=True)
class Summary:
    """One run. Rates per second; `seconds` from the first request sent to the last answer.

    errors: how often each message came. goodput: None without an SLO. has_usage: whether the server counted tokens;
    otherwise each event counts as one.
    """

    num_completed: int
    num_failed: int
    seconds: float
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    requests_per_second: float
    output_tokens_per_second: float
    total_tokens_per_second: float
    tokens_per_event: float
    goodput: float | None
    ttft: Distribution
    itl: Distribution
    tpot: Distribution
    e2e: Distribution
    errors: dict[str, int]
    has_usage: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def summarize(samples: Sequence[Sample], slo: Mapping[str, float] | None = None) -> Summary:
    """Numbers of one run. slo: limits in milliseconds."""
    good = [sample for sample in samples if sample.error is None]
    seconds = max((sample.end for sample in samples), default=0.0) - min((s.start for s in samples), default=0.0)
    num_prompt_tokens = sum(sample.num_prompt_tokens for sample in good)
    num_output_tokens = sum(sample.num_output_tokens for sample in good)
    per_second = 1 / seconds if seconds > 0 else 0.0
    errors: dict[str, int] = {}
    for sample in samples:
        if sample.error is not None:
            errors[sample.error] = errors.get(sample.error, 0) + 1
    return Summary(
        num_completed=len(good),
        num_failed=len(samples) - len(good),
        seconds=seconds,
        num_prompt_tokens=num_prompt_tokens,
        num_output_tokens=num_output_tokens,
        num_cached_tokens=sum(sample.num_cached_tokens for sample in good),
        requests_per_second=len(good) * per_second,
        output_tokens_per_second=num_output_tokens * per_second,
        total_tokens_per_second=(num_prompt_tokens + num_output_tokens) * per_second,
        tokens_per_event=num_output_tokens / max(1, sum(len(sample.event_times) for sample in good)),
        goodput=None if slo is None else sum(meets(sample, slo) for sample in good) * per_second,
        ttft=Distribution.of([sample.ttft for sample in good]),
        itl=Distribution.of([after - before for s in good for before, after in pairwise(s.event_times)]),
        tpot=Distribution.of([tpot for sample in good if (tpot := sample.tpot) is not None]),
        e2e=Distribution.of([sample.latency for sample in good]),
        errors=errors,
        has_usage=all(sample.has_usage for sample in good),
    )


def meets(sample: Sample, slo: Mapping[str, float]) -> bool:
    """Whether a request kept within every limit (milliseconds)."""
    measured = {"ttft": sample.ttft, "tpot": sample.tpot or 0.0, "e2e": sample.latency}
    return all(1000 * measured[name] <= limit for name, limit in slo.items())


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Interpolated between the two nearest of the ascending values."""
    position = (len(ordered) - 1) * percent / 100
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)
