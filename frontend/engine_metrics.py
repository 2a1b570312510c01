"""What the engine core measures, shown from its latest heartbeat: any frontend shows the same truth."""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from typing import NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from minivllm.protocol import EngineStats, Histogram

_LABELS = ("model_name", "engine")


class ProcessUsage(NamedTuple):
    """One process of this server. rss in bytes, cpu_seconds since it started."""

    name: str
    rss: int
    cpu_seconds: float


class EngineCollector(Collector):
    """Turns the snapshot that `stats()` returns into metric families, each time /metrics is read.

    stats_age: seconds since the snapshot was taken, infinite before the first one: counters are then left out.
    num_restarts: of the engine core, as seen by this frontend.
    processes: filled in by whoever watches the processes.
    """

    def __init__(self, labels: tuple[str, str]) -> None:
        self._labels = labels
        self.stats: Callable[[], EngineStats] = EngineStats
        self.stats_age: Callable[[], float] = lambda: math.inf
        self.num_restarts: Callable[[], int] = int
        self.processes: list[ProcessUsage] = []

    def describe(self) -> Iterable[Metric]:
        """Empty, so that registering does not collect."""
        return []

    def collect(self) -> Iterator[Metric]:
        stats = self.stats()
        yield from self._gauges(stats)
        if math.isfinite(self.stats_age()):  # before that, zeros would look like a restart of the engine core
            yield from self._counters(stats)
            yield from self._histograms(stats.histograms)
        yield from self._processes()

    def _gauges(self, stats: EngineStats) -> Iterator[Metric]:
        num_blocks = stats.kv_blocks_used + stats.kv_blocks_cached + stats.kv_blocks_free
        usage = stats.kv_blocks_used / num_blocks if num_blocks else 0.0
        yield self._gauge("vllm:num_requests_running", "Requests in prefill or decode", stats.num_requests_running)
        yield self._gauge("vllm:num_requests_waiting", "Requests that wait", stats.num_requests_waiting)
        yield self._gauge("vllm:kv_cache_usage_perc", "Part of the KV cache that live requests use, 0 to 1", usage)
        yield self._gauge("minivllm:tokens_per_second", "Tokens generated per second", stats.tokens_per_second)
        yield self._gauge("minivllm:gpu_memory_bytes", "Device memory in use", stats.gpu_memory_bytes)
        yield self._gauge("minivllm:kv_blocks_leaked", "KV blocks that belong to nobody", stats.kv_blocks_leaked)
        yield self._gauge("minivllm:engine_stats_age_seconds", "Age of the engine core's numbers", self.stats_age())
        blocks = GaugeMetricFamily("minivllm:kv_blocks", "KV blocks by state", labels=(*_LABELS, "state"))
        blocks.add_metric((*self._labels, "used"), stats.kv_blocks_used)
        blocks.add_metric((*self._labels, "cached"), stats.kv_blocks_cached)
        blocks.add_metric((*self._labels, "free"), stats.kv_blocks_free)
        yield blocks

    def _counters(self, stats: EngineStats) -> Iterator[Metric]:
        yield self._counter("vllm:prompt_tokens", "Prompt tokens processed", stats.prompt_tokens)
        yield self._counter("vllm:generation_tokens", "Tokens generated", stats.generation_tokens)
        yield self._counter("vllm:num_preemptions", "Requests pushed back to the queue", stats.num_preemptions)
        yield self._counter("vllm:prefix_cache_queries", "Tokens looked up by prefix", stats.prefix_cache_queries)
        yield self._counter("vllm:prefix_cache_hits", "Tokens found by prefix", stats.prefix_cache_hits)
        yield self._counter("minivllm:requests_submitted", "Requests taken by the engine", stats.num_requests_submitted)
        finished = CounterMetricFamily(
            "minivllm:requests_finished", "Requests ended by the engine", labels=(*_LABELS, "finished_reason")
        )
        for reason, count in stats.num_requests_finished.items():
            finished.add_metric((*self._labels, reason), count)
        yield finished
        yield self._counter("minivllm:engine_restarts", "Restarts of the engine core", self.num_restarts())
        yield self._counter("minivllm:oom_recoveries", "Steps repeated after out of memory", stats.num_oom_recoveries)

    def _histograms(self, histograms: dict[str, Histogram]) -> Iterator[Metric]:
        for name, documentation, source in (
            ("vllm:iteration_tokens_total", "Tokens processed per step", "iteration_tokens"),
            ("minivllm:decode_batch_size", "Requests per decode step", "decode_batch_size"),
            ("minivllm:prefill_batch_tokens", "Prompt tokens per prefill step", "prefill_batch_tokens"),
        ):
            family = HistogramMetricFamily(name, documentation, labels=_LABELS)
            _add_histogram(family, self._labels, histograms.get(source))
            yield family
        steps = HistogramMetricFamily("minivllm:step_seconds", "Time a pass has the device", labels=(*_LABELS, "kind"))
        for kind in ("prefill", "decode"):
            _add_histogram(steps, (*self._labels, kind), histograms.get(f"step_seconds_{kind}"))
        yield steps

    def _processes(self) -> Iterator[Metric]:
        labels = (*_LABELS, "process")
        rss = GaugeMetricFamily("minivllm:process_rss_bytes", "Resident memory", labels=labels)
        cpu = CounterMetricFamily("minivllm:process_cpu_seconds", "CPU time", labels=labels)
        for process in self.processes:
            rss.add_metric((*self._labels, process.name), process.rss)
            cpu.add_metric((*self._labels, process.name), process.cpu_seconds)
        yield rss
        yield cpu

    def _gauge(self, name: str, documentation: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, documentation, labels=_LABELS)
        family.add_metric(self._labels, value)
        return family

    def _counter(self, name: str, documentation: str, value: float) -> Metric:
        family = CounterMetricFamily(name, documentation, labels=_LABELS)
        family.add_metric(self._labels, value)
        return family


def _add_histogram(family: HistogramMetricFamily, labels: tuple[str, ...], histogram: Histogram | None) -> None:
    """Prometheus counts cumulatively; without a histogram yet, an empty one."""
    source = histogram or Histogram([], [0])
    bounds = [*map(str, source.bounds), "+Inf"]
    family.add_metric(labels, list(zip(bounds, accumulate(source.counts), strict=True)), source.sum)
