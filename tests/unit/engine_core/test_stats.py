"""The seconds of a pass; and the statistics line: rates of its interval, silence when nothing happens."""

import time

import pytest

from engine_core.stats import StatsLine
from minivllm.protocol import EngineStats
from minivllm.simulate.engine import Policy, VirtualClock, make_simulated_engine
from tests.support.cost_models import cost_model
from tests.support.engines import assert_idle, greedy, run_to_end


@pytest.mark.parametrize("depth", [0, 1])
def test_a_pass_counts_for_the_time_that_it_has_the_device(depth: int) -> None:
    clock = VirtualClock()
    engine = make_simulated_engine(cost_model(depth=depth), Policy(), clock)
    for name in ("a", "b"):
        engine.add_request(name, [1] * 10, greedy(9))
        run_to_end(engine)
        clock.wait_until(clock() + 60)  # nobody has the device meanwhile
    histograms = engine.stats().histograms
    assert histograms["step_seconds_prefill"].sum == pytest.approx(2 * 0.010)
    assert histograms["step_seconds_decode"].sum == pytest.approx(2 * 8 * 0.010)
    assert_idle(engine)


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
