"""What this process measures of its requests, and the page that /metrics shows.

Names and labels are vLLM's, so that existing dashboards read them. Intervals lie within this process's own clock.
With PROMETHEUS_MULTIPROC_DIR set, several frontends write to shared files and each shows the sum.
"""

import os
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from frontend.bulk_histogram import BulkHistogram
from frontend.engine_metrics import EngineCollector
from frontend.live_request import LiveRequest
from minivllm.protocol import Finished

ENGINE = "0"  # label `engine`: there is one engine core
_LABELS = ("model_name", "engine")
_SECONDS = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0)
_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0)
_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0)
_TOKENS = tuple(float(base * 10**power) for power in range(6) for base in (1, 2, 5))
_FLUSH_SECONDS = 1.0


class FrontendMetrics:
    """A `RequestObserver` that counts into Prometheus metrics."""

    def __init__(self, model_name: str, engine_collector: EngineCollector) -> None:
        self._labels = (model_name, ENGINE)
        self._registry = CollectorRegistry()
        self._shown = self._registry
        if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
            self._shown = CollectorRegistry()
            MultiProcessCollector(self._shown)  # type: ignore[no-untyped-call]
        self._shown.register(engine_collector)
        self._success = Counter(
            "vllm:request_success", "Requests by how they ended", (*_LABELS, "finished_reason"), registry=self._registry
        )
        self._first_token = self._histogram("vllm:time_to_first_token_seconds", "Arrival to first token", _FIRST_TOKEN)
        self._inter_token = BulkHistogram(
            "vllm:inter_token_latency_seconds", "Between outputs", _LABELS, buckets=_PER_TOKEN, registry=self._registry
        ).labels(*self._labels)
        self._next_flush = 0.0
        self._per_token = self._histogram(
            "vllm:request_time_per_output_token_seconds", "A request's mean time per token after the first", _PER_TOKEN
        )
        self._e2e = self._histogram("vllm:e2e_request_latency_seconds", "Arrival to end", _SECONDS)
        self._queue = self._histogram("vllm:request_queue_time_seconds", "Waiting to be scheduled", _SECONDS)
        self._prefill = self._histogram("vllm:request_prefill_time_seconds", "Scheduled to first token", _SECONDS)
        self._decode = self._histogram("vllm:request_decode_time_seconds", "First to last token", _SECONDS)
        self._inference = self._histogram("vllm:request_inference_time_seconds", "Scheduled to last token", _SECONDS)
        self._prompt_tokens = self._histogram("vllm:request_prompt_tokens", "Prompt tokens of a request", _TOKENS)
        self._output_tokens = self._histogram("vllm:request_generation_tokens", "Output tokens of a request", _TOKENS)
        self._resumed = Counter(
            "minivllm:requests_resumed", "Requests continued after an engine restart", _LABELS, registry=self._registry
        ).labels(*self._labels)

    def render(self) -> bytes:
        """The page in Prometheus' text format."""
        self._inter_token.flush()
        return generate_latest(self._shown)

    def on_tokens(self, request: LiveRequest, now: float) -> None:
        """Tokens of `request` arrived at `now` (`time.monotonic`)."""
        if request.first_token_time:
            self._inter_token.count(now - request.last_token_time)
        else:
            request.first_token_time = now
            self._first_token.observe(now - request.arrival_time)
        request.last_token_time = now
        if now >= self._next_flush:  # for other frontends: they show the sum of all
            self._next_flush = now + _FLUSH_SECONDS
            self._inter_token.flush()

    def on_resumed(self, request: LiveRequest) -> None:
        """`request` was submitted again, to continue after its last token."""
        self._resumed.inc()

    def on_finished(self, request: LiveRequest, finished: Finished, now: float) -> None:
        """`request` ended at `now`. Times measured by the engine core exist where it said how the request ended."""
        self._success.labels(*self._labels, finished.reason).inc()
        self._e2e.observe(now - request.arrival_time)
        self._prompt_tokens.observe(request.num_prompt_tokens)
        self._output_tokens.observe(request.num_output_tokens)
        if request.num_output_tokens > 1:
            duration = request.last_token_time - request.first_token_time
            self._per_token.observe(duration / (request.num_output_tokens - 1))
        if finished.queue_time or finished.prefill_time:
            self._queue.observe(finished.queue_time)
            self._prefill.observe(finished.prefill_time)
            self._decode.observe(finished.decode_time)
            self._inference.observe(finished.prefill_time + finished.decode_time)

    def _histogram(self, name: str, documentation: str, buckets: Sequence[float]) -> Histogram:
        histogram = Histogram(name, documentation, _LABELS, buckets=buckets, registry=self._registry)
        return histogram.labels(*self._labels)
