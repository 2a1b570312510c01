"""The simulator: the real engine core finishes every trace, leaks nothing, and says the same each time."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_core.scheduler import Batch
from minivllm.cli import main
from minivllm.errors import StartupError
from minivllm.simulate.capacity import SLO, find_rate, num_servers
from minivllm.simulate.cost_model import Curve, causal_pairs, load_cost_model
from minivllm.simulate.engine import Policy
from minivllm.simulate.metrics import Latency
from minivllm.simulate.run import Simulation, simulate
from minivllm.simulate.trace import Arrival, TraceShape, make_trace, read_trace
from tests.support.cost_models import cost_model


def run(*arrivals: Arrival, policy: Policy | None = None, **changes: Any) -> Simulation:
    return simulate(cost_model(**changes), policy or Policy(), arrivals)


def test_one_request_takes_what_its_passes_cost() -> None:
    metrics = run(Arrival(1.0, 16, 5)).metrics
    assert metrics.ttft.mean == pytest.approx(16.0)
    assert metrics.tpot.mean == pytest.approx(10.0)
    assert metrics.e2e.mean == pytest.approx(56.0)
    assert (metrics.num_output_tokens, metrics.num_steps, metrics.mean_decode_batch) == (5, 5, 1.0)
    assert metrics.seconds == pytest.approx(0.056)


def test_a_pass_in_flight_overlaps_with_the_host() -> None:
    alone, ahead = (run(Arrival(0.0, 16, 5), depth=depth).metrics for depth in (0, 1))
    assert ahead.e2e.mean == pytest.approx(alone.e2e.mean)
    assert ahead.num_output_tokens == 5


def test_requests_that_wait_in_line_wait_for_chunks() -> None:
    simulation = run(Arrival(0.0, 64, 1), Arrival(0.0, 32, 1), policy=Policy(max_num_seqs=1))
    first, second = simulation.observed.requests
    assert first.first_token == pytest.approx(0.064)
    assert second.queue_time == pytest.approx(0.064)
    assert second.first_token == pytest.approx(0.096)


def test_costs_follow_tokens_rows_and_context() -> None:
    model = cost_model(decode_per_context_token=0.001, prefill_per_pair=0.1, prefill_per_row=1.0)
    decode = Batch("decode", requests=[None] * 6, starts=[9] * 6, counts=[1] * 6)  # type: ignore[list-item]
    assert model.seconds(decode) == pytest.approx(0.015 + 60 * 0.001)
    prefill = Batch("prefill", requests=[None] * 2, starts=[0, 4], counts=[3, 2])  # type: ignore[list-item]
    assert model.seconds(prefill) == pytest.approx(0.010 + 0.1 * (6 + 11) + 1.0)
    assert causal_pairs(4, 2) == 5 + 6


@pytest.mark.parametrize(("size", "seconds"), [(1, 2.0), (2, 2.0), (4, 3.0), (6, 4.0), (10, 6.0)])
def test_a_curve_is_straight_between_points_and_beyond(size: int, seconds: float) -> None:
    assert Curve((2, 6), (2.0, 4.0))(size) == pytest.approx(seconds)


arrivals = st.builds(
    Arrival,
    st.sampled_from([0.0, 0.1, 5.0]),
    st.integers(8, 60),
    st.integers(1, 40),
    st.integers(0, 2),
    st.integers(0, 8),
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(arrivals, min_size=1, max_size=25),
    st.integers(1, 6),
    st.integers(26, 80),
    st.integers(4, 40),
    st.booleans(),
    st.integers(0, 1),
)
def test_every_request_finishes_and_nothing_leaks(
    trace: list[Arrival], max_num_seqs: int, num_blocks: int, budget: int, caching: bool, depth: int
) -> None:
    trace = sorted(trace, key=lambda arrival: arrival.time)
    policy = Policy(max_num_seqs, budget, num_blocks=num_blocks, enable_prefix_caching=caching)
    simulation = run(*trace, policy=policy, depth=depth)  # checks the pool's integrity itself
    requests = simulation.observed.requests
    assert [request.arrival for request in requests] == trace
    assert [request.num_tokens for request in requests] == [arrival.num_output_tokens for arrival in trace]
    assert all(request.arrival.time < request.first_token <= request.last_token for request in requests)
    assert simulation.observed.used_blocks[-1] == 0
    assert max(simulation.observed.used_blocks) <= num_blocks
    assert max(simulation.observed.num_decoding) <= max_num_seqs
    times = list(simulation.observed.step_times)
    assert times == sorted(times)


def test_a_simulation_is_a_function_of_its_seed() -> None:
    shape = TraceShape(num_requests=50, rate=20.0, input_lens=(8, 60), output_lens=(1, 40))
    runs = [simulate(cost_model(), Policy(num_blocks=40), make_trace(shape)).metrics for _ in range(2)]
    assert runs[0] == runs[1]
    assert runs[0].num_preemptions > 0


def test_shared_prefixes_are_found() -> None:
    shape = TraceShape(num_requests=20, input_lens=(8, 8), output_lens=(4, 4), prefix_tokens=40, num_prefixes=2, rate=2)
    with_cache, without = (
        simulate(cost_model(), Policy(enable_prefix_caching=on), make_trace(shape)).metrics for on in (True, False)
    )
    assert with_cache.prefix_hit_rate == pytest.approx(18 * 40 / (20 * 48))  # all but the first of each prefix
    assert without.prefix_hit_rate == 0
    assert with_cache.ttft.p50 < without.ttft.p50


def test_prompts_differ_after_their_prefix() -> None:
    prompts = [Arrival(0.0, 12, 1, 5, 4).prompt_token_ids(index, 320) for index in range(2000)]
    assert len({tuple(prompt[:4]) for prompt in prompts}) == 1
    assert len({tuple(prompt[4:8]) for prompt in prompts}) == 2000
    assert all(len(prompt) == 12 and max(prompt) < 320 for prompt in prompts)


def test_arrivals() -> None:
    def times(**shape: Any) -> list[float]:
        return [arrival.time for arrival in make_trace(TraceShape(**shape))]

    assert times(arrivals="at-once", num_requests=3) == [0.0, 0.0, 0.0]
    assert times(arrivals="burst", num_requests=5, burst_size=2, rate=4.0) == [0.0, 0.0, 0.5, 0.5, 1.0]
    slow, fast = times(num_requests=1001, rate=1.0), times(num_requests=1001, rate=4.0)
    assert fast == pytest.approx([time / 4 for time in slow])
    assert slow[-1] == pytest.approx(1000, rel=0.15)


def test_lognormal_lengths_stay_within_their_limits() -> None:
    trace = make_trace(TraceShape(num_requests=500, lengths="lognormal", input_lens=(10, 1000), output_lens=(5, 5)))
    lengths = sorted(arrival.num_prompt_tokens for arrival in trace)
    assert (lengths[0] >= 10, lengths[-1] <= 1000) == (True, True)
    assert 80 < lengths[250] < 125  # the median is the geometric mean


def test_percentiles_are_values_that_occurred() -> None:
    latency = Latency.of(value / 1000 for value in range(1, 101))
    assert (latency.p50, latency.p90, latency.p99, latency.mean) == pytest.approx((50.0, 90.0, 99.0, 50.5))


def test_the_highest_rate_that_keeps_an_slo() -> None:
    shape = TraceShape(num_requests=300, input_lens=(16, 16), output_lens=(1, 1))
    slo = SLO.parse(("ttft:100",), 90)

    def metrics_at(rate: float) -> Any:
        return simulate(cost_model(), Policy(), make_trace(shape.at_rate(rate))).metrics

    probes = find_rate(metrics_at, slo)
    best = probes[-1]
    assert not best.violations
    assert all(probe.violations for probe in probes if probe.rate > best.rate)
    assert min(probe.rate for probe in probes if probe.violations) <= best.rate * 1.021
    assert 10 < best.rate < 62.5 * 1.2  # 16 ms each: about 62 a second would keep the device busy
    assert num_servers(3.5 * best.rate, best.rate) == 4


def test_an_slo_that_nothing_keeps_is_refused() -> None:
    slo = SLO.parse(("ttft:5",), 50)
    with pytest.raises(StartupError, match="cannot be kept"):
        find_rate(lambda rate: run(Arrival(0.0, 16, 1)).metrics, slo)


def test_a_trace_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"time": 2.0, "prompt_tokens": 9, "output_tokens": 3}\n\n'
        '{"time": 1.0, "prompt_tokens": 8, "output_tokens": 2, "prefix": 1, "prefix_tokens": 4}\n'
    )
    assert read_trace(path) == [Arrival(1.0, 8, 2, 1, 4), Arrival(2.0, 9, 3)]
    for line, message in (
        ('{"time": -1, "prompt_tokens": 9, "output_tokens": 3}', "line 1: time must be 0 or more"),
        ('{"time": 0, "prompt_tokens": 9}', "line 1: .*output_tokens"),
        ('{"time": 0, "prompt_tokens": 3, "output_tokens": 1, "prefix_tokens": 4}', "prefix_tokens 4 of a prompt of 3"),
        ("", "no request"),
    ):
        path.write_text(line + "\n")
        with pytest.raises(StartupError, match=message):
            read_trace(path)


def test_a_request_that_cannot_fit_is_named() -> None:
    with pytest.raises(StartupError, match="request 1 of the trace: the prompt has 300 tokens"):
        run(Arrival(0.0, 16, 1), Arrival(0.0, 300, 1))


@pytest.fixture
def cost_file(tmp_path: Path) -> str:
    path = tmp_path / "cost.json"
    path.write_text(cost_model().as_json())
    return str(path)


def test_the_command_prints_plots_and_writes(
    tmp_path: Path, cost_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plot, numbers = tmp_path / "plot.svg", tmp_path / "numbers.json"
    arguments = ["--cost-model", cost_file, "--num-requests", "50", "--input-lens", "8,60", "--output-lens", "2,20"]
    assert main(["simulate", *arguments, "--plot", str(plot), "--json", str(numbers)]) == 0
    assert "50 requests" in capsys.readouterr().out
    assert "<svg" in plot.read_text()
    content = json.loads(numbers.read_text())
    assert content["metrics"]["num_requests"] == 50
    assert content["options"]["num_requests"] == 50


def test_the_command_plans_capacity(cost_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--cost-model", cost_file, "--num-requests", "60", "--input-lens", "8,60", "--output-lens", "2,20"]
    assert main(["simulate", *arguments, "--slo", "ttft:300,tpot:40", "--traffic", "100"]) == 0
    assert "100 requests/s need " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--slo", "ttft"], "ttft must be milliseconds"),
        (["--slo", "latency:3"], "slo must name ttft"),
        (["--traffic", "3"], "traffic needs --slo"),
        (["--slo", "ttft:3", "--arrivals", "at-once"], "looks for a rate"),
        (["--input-lens", "9,3"], "input_lens must be shortest,longest"),
    ],
)
def test_bad_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["simulate", *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_cost_model_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="No such file"):
        load_cost_model(str(tmp_path / "missing.json"))
    path = tmp_path / "bad.json"
    path.write_text('{"description": "x"}')
    with pytest.raises(StartupError, match="is no cost model"):
        load_cost_model(str(path))
    content = json.loads(cost_model().as_json())
    path.write_text(json.dumps(content | {"prefill": {"sizes": [1], "seconds": [0.0]}}))
    with pytest.raises(StartupError, match="costs nothing"):
        load_cost_model(str(path))
    content["decode"]["sizes"] = [11, 1]
    path.write_text(json.dumps(content))
    with pytest.raises(StartupError, match="sizes of a curve must ascend"):
        load_cost_model(str(path))
