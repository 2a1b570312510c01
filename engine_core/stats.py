"""Counts of the engine core, kept where things happen: cumulative, so that any frontend can show the same truth."""

import logging
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable

import torch

from engine_core.kv_cache_manager import KVCacheManager
from engine_core.scheduler import Batch, Scheduler
from minivllm.protocol import EngineStats, Finished, Histogram

logger = logging.getLogger(__name__)

_TOKENS = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0]
_SECONDS = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0]
_RATE_WINDOW = 10.0  # seconds


class EngineCounters:
    """Everything /metrics says of the engine core."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.num_submitted = 0
        self.num_finished: dict[str, int] = {}
        self.num_oom_recoveries = 0
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self._histograms = {
            name: Histogram(bounds, [0] * (len(bounds) + 1))
            for name, bounds in (
                ("iteration_tokens", _TOKENS),
                ("decode_batch_size", _TOKENS),
                ("prefill_batch_tokens", _TOKENS),
                ("step_seconds_prefill", _SECONDS),
                ("step_seconds_decode", _SECONDS),
            )
        }
        self._recent: deque[tuple[float, int]] = deque()  # (time, generated tokens)

    def step_done(self, batch: Batch, seconds: float) -> None:
        """`batch` was collected and had the device for `seconds`: since its launch, or the end of the pass before."""
        self._observe("iteration_tokens", batch.num_tokens)
        self._observe(f"step_seconds_{batch.kind}", seconds)
        if batch.kind == "decode":
            self._observe("decode_batch_size", len(batch.requests))
        else:
            self._observe("prefill_batch_tokens", batch.num_tokens)

    def tokens_done(self, num_prompt_tokens: int, num_generated: int) -> None:
        """A pass brought `num_generated` tokens and completed prompts of `num_prompt_tokens` tokens."""
        self.prompt_tokens += num_prompt_tokens
        self.generation_tokens += num_generated
        self._recent.append((self._clock(), num_generated))

    def request_finished(self, finished: Finished) -> None:
        self.num_finished[finished.reason] = self.num_finished.get(finished.reason, 0) + 1

    def tokens_per_second(self) -> float:
        """Generated tokens, over the last 10 seconds."""
        now = self._clock()
        while self._recent and self._recent[0][0] < now - _RATE_WINDOW:
            self._recent.popleft()
        return sum(num_generated for _, num_generated in self._recent) / _RATE_WINDOW

    def snapshot(self, scheduler: Scheduler, kv: KVCacheManager, num_held_blocks: int) -> EngineStats:
        """All numbers now. `num_held_blocks` is what the block tables of all live requests hold, shared ones once."""
        pool = kv.pool
        return EngineStats(
            num_requests_running=scheduler.num_running,
            num_requests_waiting=scheduler.num_waiting,
            kv_blocks_used=pool.num_used,
            kv_blocks_cached=pool.num_cached,
            kv_blocks_free=pool.num_unused - pool.num_cached,
            kv_blocks_leaked=pool.num_used - num_held_blocks,
            num_preemptions=scheduler.num_preemptions,
            prompt_tokens=self.prompt_tokens,
            generation_tokens=self.generation_tokens,
            prefix_cache_queries=kv.num_prefix_queries,
            prefix_cache_hits=kv.num_prefix_hits,
            num_requests_submitted=self.num_submitted,
            num_requests_finished=dict(self.num_finished),
            num_oom_recoveries=self.num_oom_recoveries,
            tokens_per_second=self.tokens_per_second(),
            gpu_memory_bytes=torch.cuda.memory_reserved() if torch.cuda.is_initialized() else 0,
            histograms=self._histograms,
        )

    def _observe(self, name: str, value: float) -> None:
        histogram = self._histograms[name]
        histogram.counts[bisect_left(histogram.bounds, value)] += 1
        histogram.sum += value


class StatsLine:
    """Logs one line of statistics every `seconds` while there is something to say."""

    def __init__(self, seconds: float = 10.0) -> None:
        self._seconds = seconds
        self._last = EngineStats()
        self._last_time = time.monotonic()

    def update(self, stats: EngineStats, now: float) -> None:
        """Look at the numbers of `now` (seconds, monotonic); call it at every heartbeat."""
        elapsed = now - self._last_time
        if elapsed < self._seconds:
            return
        last, self._last, self._last_time = self._last, stats, now
        prompt = stats.prompt_tokens - last.prompt_tokens
        generated = stats.generation_tokens - last.generation_tokens
        busy = stats.num_requests_running + stats.num_requests_waiting
        if not (prompt or generated or busy):
            return
        total_blocks = stats.kv_blocks_used + stats.kv_blocks_cached + stats.kv_blocks_free
        logger.info(
            "prompt %.1f tokens/s, generation %.1f tokens/s, running %d, waiting %d, "
            "KV usage %.1f %%, prefix hits %.1f %%",
            prompt / elapsed,
            generated / elapsed,
            stats.num_requests_running,
            stats.num_requests_waiting,
            100 * stats.kv_blocks_used / total_blocks,
            100 * stats.prefix_cache_hits / max(1, stats.prefix_cache_queries),
        )
