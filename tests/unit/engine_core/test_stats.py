"""The statistics line: rates of its interval, silence when nothing happens."""

import time

import pytest

from engine_core.stats import StatsLine
from minivllm.protocol import EngineStats


def test_line_shows_rates_of_the_interval_and_idle_engines_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    start = time.monotonic()
    line = StatsLine(seconds=10.0)
    line.update(EngineStats(kv_blocks_free=100), start + 20)
    assert not caplog.messages
    work = EngineStats(
        prompt_tokens=400,
        generation_tokens=50,
        num_requests_running=3,
        num_requests_waiting=2,
        kv_blocks_used=25,
        kv_blocks_cached=25,
        kv_blocks_free=50,
        prefix_cache_queries=200,
        prefix_cache_hits=50,
    )
    line.update(work, start + 25)  # too early
    assert not caplog.messages
    line.update(work, start + 40)
    assert caplog.messages == [
        "prompt 20.0 tokens/s, generation 2.5 tokens/s, running 3, waiting 2, KV usage 25.0 %, prefix hits 25.0 %"
    ]
