"""The loads of the HTTP part: options that `bench serve` has, and the run in the middle."""

from minivllm.bench.gpu_http import LOADS, SMOKE, measurements
from minivllm.bench.offline.gpu_suite import GOALS
from minivllm.bench.serving.options import ServeBenchOptions
from minivllm.options import load_options


def result(tokens_per_second: float) -> dict[str, object]:
    latencies = {"percentiles": {"50": 1000 / tokens_per_second, "99": 2000 / tokens_per_second}}
    return {"output_tokens_per_second": tokens_per_second, "ttft": latencies, "itl": latencies}


def test_all_numbers_are_of_the_run_with_the_median_rate() -> None:
    rows = {row["name"]: row["value"] for row in measurements("load", [result(100.0), result(400.0), result(200.0)])}
    assert rows == {"load": 200.0, "load: TTFT p50": 5.0, "load: TTFT p99": 10.0, "load: ITL p50": 5.0}


def test_loads_are_what_the_load_generator_understands() -> None:
    sizes = [len(load_options(ServeBenchOptions, load.options, load.name, {}).requests(0)) for load in (*LOADS, *SMOKE)]
    assert sizes == [256, 512, 256, 8, 4]


def test_every_goal_over_http_is_measured() -> None:
    measured = {row["name"] for load in LOADS for row in measurements(load.name, [result(1.0)])}
    assert {goal.measurement for goal in GOALS if goal.part == "http-0.6b"} <= measured
