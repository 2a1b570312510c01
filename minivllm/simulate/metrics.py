"""What a run comes down to: the numbers of the real benchmark, from a real or a simulated run."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from engine_core.engine import EngineCore
from minivllm.simulate.drive import Observed

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, seconds: Iterable[float]) -> "Latency":
        """Percentiles are values that occurred: the smallest that so many do not exceed."""
        values = 1000 * np.fromiter(seconds, dtype=float)
        if not len(values):
            return cls(0.0, 0.0, 0.0, 0.0)
        found = np.percentile(values, PERCENTILES, method="inverted_cdf")
        return cls(float(values.mean()), *map(float, found))


@dataclass(frozen=True, slots=True)
class Metrics:
    """One run, from the first arrival to the last token. Rates per second; usage as a fraction of all blocks."""

    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int
    seconds: float
    requests_per_second: float
    tokens_per_second: float
    ttft: Latency
    itl: Latency
    tpot: Latency
    e2e: Latency
    queue: Latency
    num_steps: int
    num_preemptions: int
    mean_decode_batch: float
    kv_usage_mean: float  # over time
    kv_usage_peak: float
    queue_peak: int  # most requests in the prefill queue
    prefix_hit_rate: float  # tokens found / tokens looked up


def measure(engine: EngineCore, observed: Observed) -> Metrics:
    """The numbers of a run on an engine that did nothing before."""
    requests = observed.requests
    arrivals = [request.arrival for request in requests]
    stats = engine.stats()
    seconds = observed.step_times[-1] - arrivals[0].time
    num_output_tokens = sum(request.num_tokens for request in requests)
    decode_steps = stats.histograms["decode_batch_size"]
    usage = np.frombuffer(observed.used_blocks, dtype="l") / engine.kv_pool.num_blocks
    return Metrics(
        num_requests=len(requests),
        num_prompt_tokens=sum(arrival.num_prompt_tokens for arrival in arrivals),
        num_output_tokens=num_output_tokens,
        seconds=seconds,
        requests_per_second=len(requests) / seconds,
        tokens_per_second=num_output_tokens / seconds,
        ttft=Latency.of(request.first_token - request.arrival.time for request in requests),
        itl=Latency.of(observed.itl),
        tpot=Latency.of(
            (request.last_token - request.first_token) / (request.num_tokens - 1)
            for request in requests
            if request.num_tokens > 1
        ),
        e2e=Latency.of(request.last_token - request.arrival.time for request in requests),
        queue=Latency.of(request.queue_time for request in requests),
        num_steps=len(observed.step_times),
        num_preemptions=stats.num_preemptions,
        mean_decode_batch=decode_steps.sum / max(1, sum(decode_steps.counts)),
        kv_usage_mean=float(np.average(usage, weights=_durations(observed))),
        kv_usage_peak=float(usage.max()),
        queue_peak=max(observed.num_prefilling),
        prefix_hit_rate=stats.prefix_cache_hits / max(1, stats.prefix_cache_queries),
    )


def _durations(observed: Observed) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    """Seconds for which the state after each step lasted; never all zero."""
    times = np.frombuffer(observed.step_times, dtype=float)
    return np.diff(times, append=times[-1]) + 1e-12
