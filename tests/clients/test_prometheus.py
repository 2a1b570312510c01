"""A real Prometheus server scrapes /metrics, computes rates and answers every query of the Grafana board.

Skipped where there is no `prometheus` (Debian and Ubuntu have it as a package of this name).
"""

import json
import math
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.dashboard import PROMTOOL, board_expressions, promtool_complaints
from tests.support.server import ServerProcess, wait_until

PROMETHEUS = shutil.which("prometheus")
SCRAPE_SECONDS = 0.5
WINDOW = "5m"  # longer than a test
TOKENS = "vllm:generation_tokens_total"

pytestmark = pytest.mark.skipif(PROMETHEUS is None, reason="prometheus is not installed")


class Prometheus:
    """Its query API. `url`: where it listens."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=30)

    def query(self, expression: str, at: float | None = None) -> list[dict[str, Any]]:
        """The series of an instant query, at a time on `time.time` or now."""
        parameters: dict[str, str | float] = {"query": expression, **({} if at is None else {"time": at})}
        answer = self._http.get("/api/v1/query", params=parameters).json()
        assert answer["status"] == "success", answer
        result: list[dict[str, Any]] = answer["data"]["result"]
        return result

    def value(self, expression: str, at: float | None = None) -> float:
        """Of the only series; NaN when there is none yet."""
        series = self.query(expression, at)
        return float(series[0]["value"][1]) if series else float("nan")

    def label_values(self, label: str, metric: str) -> list[str]:
        answer = self._http.get(f"/api/v1/label/{label}/values", params={"match[]": metric}).json()
        values: list[str] = answer["data"]
        return values

    def close(self) -> None:
        self._http.close()


@contextmanager
def prometheus_on(address: str, directory: Path) -> Iterator[Prometheus]:
    """A Prometheus server of its own that scrapes `address`, killed after the block."""
    assert PROMETHEUS is not None
    scrape = {"job_name": "minivllm", "static_configs": [{"targets": [address]}]}
    timing = {"scrape_interval": f"{SCRAPE_SECONDS * 1000:.0f}ms", "scrape_timeout": f"{SCRAPE_SECONDS * 1000:.0f}ms"}
    config = directory / "prometheus.yml"
    config.write_text(json.dumps({"global": timing, "scrape_configs": [scrape]}), encoding="utf-8")
    command = [PROMETHEUS, f"--config.file={config}", f"--storage.tsdb.path={directory / 'data'}"]
    command += [
        "--web.listen-address=127.0.0.1:0",
        "--web.console.libraries=/nowhere",
        "--web.console.templates=/nowhere",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            match = None
            for line in process.stderr or ():
                if match := re.search(r'msg="Listening on" address=(\S+)', line):
                    break
            assert match is not None, "prometheus did not start"
            with closing(Prometheus(f"http://{match[1]}")) as prometheus:
                yield prometheus
        finally:
            process.kill()


@pytest.fixture
def prometheus(server: ServerProcess, tmp_path: Path) -> Iterator[Prometheus]:
    with prometheus_on("{}:{}".format(*server.address), tmp_path) as prometheus:
        wait_until("scraped twice", lambda: prometheus.value(f"count_over_time({TOKENS}[{WINDOW}])") >= 2)
        yield prometheus


def generate_tokens(server: ServerProcess) -> int:
    """How many."""
    answers = [server.generate(prompt="One, two, three,", max_tokens=24, ignore_eos=True) for _ in range(4)]
    return sum(len(answer["token_ids"]) for answer in answers)


def test_rates_are_what_was_generated(server: ServerProcess, prometheus: Prometheus) -> None:
    before = server.settle()[TOKENS]
    wait_until("scraped as it was", lambda: prometheus.value(TOKENS) == before)
    began = time.time()
    num_tokens = generate_tokens(server)
    after = server.settle()[TOKENS]
    wait_until("scraped as it is", lambda: prometheus.value(TOKENS) == after)
    ended = time.time()
    assert (num_tokens, after - before) == (96, 96)

    window = math.ceil(ended - began) + 2
    [series] = prometheus.query(f"{TOKENS}[{window}s]", ended)
    values = [float(value) for _, value in series["values"]]
    assert values == sorted(values)
    assert values[-1] - values[0] == num_tokens
    # Prometheus extrapolates to the ends of the window, at each by at most 1.1 of the mean time between samples.
    increase = prometheus.value(f"rate({TOKENS}[{window}s])", ended) * window
    assert num_tokens <= increase * 1.0001
    assert increase <= num_tokens * (1 + 2.2 / (len(values) - 1)) * 1.0001


def test_every_query_of_the_board_has_an_answer(server: ServerProcess, prometheus: Prometheus) -> None:
    generate_tokens(server)
    ended = server.settle().answered["length"]
    wait_until("scraped", lambda: prometheus.value('vllm:request_success_total{finished_reason="length"}') == ended)
    for expression in board_expressions(WINDOW):
        values = [float(series["value"][1]) for series in prometheus.query(expression)]
        assert values, expression
        assert all(map(math.isfinite, values)), (expression, values)
    assert prometheus.label_values("model_name", "vllm:num_requests_running") == ["smol"]


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")
def test_promtool_accepts_the_page(server: ServerProcess) -> None:
    generate_tokens(server)
    assert promtool_complaints(server.http.get("/metrics").text) == []
