"""/metrics of any frontend shows what all of them did together, and what the engine core measured once."""

from pathlib import Path

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from frontend.bulk_histogram import BulkHistogram
from tests.support.fake_engine import FakeEngine
from tests.unit.frontend.test_process import Start, start

__all__ = ["start"]
NUM_TOKENS = 6


def samples(url: str) -> dict[str, float]:
    """Sums over labels, by name; every family must be there once."""
    sums: dict[str, float] = {}
    families = list(text_string_to_metric_families(httpx.get(f"{url}/metrics").text))
    assert len({family.name for family in families}) == len(families)
    for family in families:
        for sample in family.samples:
            if sample.labels.get("le", "+Inf") == "+Inf":
                sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    return sums


def generate(url: str) -> None:
    body = {"prompt": [70], "max_tokens": NUM_TOKENS, "stream": False}
    assert httpx.post(f"{url}/generate", json=body).status_code == 200


def test_frontends_show_the_sum_of_all(start: Start, engine: FakeEngine, tmp_path: Path) -> None:
    processes = [start("--port", "0", PROMETHEUS_MULTIPROC_DIR=str(tmp_path)) for _ in range(2)]
    urls = [process.url() for process in processes]
    for url, count in zip(urls, (2, 3), strict=True):
        while httpx.get(f"{url}/ready").status_code != 200:
            pass
        for _ in range(count):
            generate(url)
        samples(url)  # hands over what was counted of single tokens
    for url in urls:
        shown = samples(url)
        assert shown["vllm:request_success_total"] == 5
        assert shown["vllm:time_to_first_token_seconds_count"] == 5
        assert shown["vllm:request_generation_tokens_sum"] == 5 * NUM_TOKENS
        assert 0 < shown["vllm:inter_token_latency_seconds_count"] <= 5 * (NUM_TOKENS - 1)
        assert shown["vllm:prompt_tokens_total"] == engine.stats.prompt_tokens
        assert shown["vllm:num_requests_running"] == engine.stats.num_requests_running
        assert shown["vllm:iteration_tokens_total_count"] == 6
    processes[0].popen.kill()
    assert psutil.wait_procs([psutil.Process(processes[0].popen.pid)], timeout=20)[1] == []
    generate(urls[1])
    assert samples(urls[1])["vllm:request_success_total"] == 6, "what a dead frontend counted stays counted"


def test_bulk_histogram_shows_what_was_counted() -> None:
    histogram = BulkHistogram("h", "help", ("a",), buckets=(1.0, 2.0), registry=None).labels("x")
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.count(value)
    histogram.flush()
    histogram.flush()
    (family,) = histogram.collect()
    assert [sample.value for sample in family.samples if sample.name == "h_bucket"] == [2.0, 3.0, 4.0]
    assert [sample.value for sample in family.samples if sample.name == "h_sum"] == [12.0]
