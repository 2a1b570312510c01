"""The engine at work as HTTP clients see it: the event stream, timelines, the trace, and the page's files."""

import asyncio
import json
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from frontend import engine_watch
from frontend.page import STATIC
from minivllm.engine_view import PrefillChunk, RequestTimeline
from minivllm.protocol import View
from tests.support.events import parse_events
from tests.support.fake_engine import FakeEngine
from tests.support.views import decode, prefill, row, view
from tests.unit.frontend.running import TIMEOUT, RunningFrontend

StartFrontend = Callable[..., RunningFrontend]
EVENTS = "/v1/engine/events"
UNSAFE = r"innerHTML|insertAdjacentHTML|document\.write|\beval\(|style=\"|\son[a-z]+=\""
TIMELINE = RequestTimeline(
    request_id="a/b", status="decode", age=2.0, num_prompt_tokens=20, num_output_tokens=3, max_total_tokens=30,
    num_cached_tokens=16, waited={"rows": 0.5}, prefill_chunks=[PrefillChunk(0.5, 16, 4, 0.6)], block_runs=[[3, 2]],
)  # fmt: skip


@contextmanager
def watching(frontend: RunningFrontend) -> Iterator[Iterator[Any]]:
    with frontend.http.stream("GET", EVENTS) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        yield parse_events(response.iter_lines())


def num_watchers(frontend: RunningFrontend) -> int:
    return len(frontend.frontend._engine.watch._watchers)


def test_events_name_every_field(frontend: RunningFrontend, engine: FakeEngine) -> None:
    with watching(frontend) as events:
        assert next(events)["facts"]["num_blocks"] == 64
        engine.wait_for(lambda: engine.num_watches)
        engine.show(view(3.0, [prefill(1, 2.0, 7, 0, 5, sampled=[7])], [row(7, "r")]))
        event = next(events)
    assert event["type"] == "view"
    assert event["epoch"] == str(engine.epoch)  # as text: a browser would round it
    assert event["steps"][0] | {"kind": "prefill", "requests": [7], "counts": [5]} == event["steps"][0]
    assert event["requests"][0]["request_id"] == "r"
    assert event["blocks"]["owners"] == [1, -1, 0]


def test_the_engine_is_asked_only_while_somebody_watches(
    frontend: RunningFrontend, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_watch, "_RENEW_SECONDS", 0.01)
    assert engine.num_watches == 0
    with watching(frontend) as events:
        next(events)
        engine.wait_for(lambda: engine.num_watches > 3)  # renewed
    engine.wait_for(lambda: num_watchers(frontend) == 0)
    assert frontend.frontend._engine.watch._renewal is None


def test_the_number_of_watchers_is_bounded(frontend: RunningFrontend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_watch, "MAX_WATCHERS", 1)
    with watching(frontend) as events:
        next(events)
        refused = frontend.http.get(EVENTS)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")


def test_a_slow_reader_misses_views() -> None:
    async def read_late() -> list[float]:
        watcher = engine_watch.Watcher()
        for number in range(200):
            watcher.put(View(1, view(float(number), [], [])))
        times = []
        while (message := await watcher.get(seconds=0.0)) is not None:
            times.append(message.view.time)
        return times

    assert asyncio.run(read_late()) == [float(number) for number in range(200 - engine_watch._MAX_UNREAD, 200)]


def test_watchers_do_not_hold_up_the_shutdown(frontend: RunningFrontend) -> None:
    with watching(frontend) as events:
        next(events)
        frontend.call(frontend.frontend.stop)
        assert list(events) == []  # the stream ends by itself
    frontend.join()


@pytest.mark.parametrize("request_id", ["", "x" * 3000])
def test_an_id_that_no_request_can_have(request_id: str, frontend: RunningFrontend) -> None:
    response = frontend.http.get(f"/v1/requests/{request_id}")
    assert (response.status_code, response.json()["error"]["type"]) == (404, "not_found_error")


def test_a_requests_timeline(frontend: RunningFrontend, engine: FakeEngine) -> None:
    engine.timelines["a/b"] = TIMELINE
    body = frontend.http.get("/v1/requests/a/b").json()
    assert (body["status"], body["waited"], body["block_runs"]) == ("decode", {"rows": 0.5}, [[3, 2]])
    assert body["prefill_chunks"] == [{"at": 0.5, "start": 16, "count": 4, "end": 0.6}]
    unknown = frontend.http.get("/v1/requests/nobody")
    assert (unknown.status_code, unknown.json()["error"]["type"]) == (404, "not_found_error")


def test_an_engine_that_does_not_answer(
    frontend: RunningFrontend, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_watch, "_EXPLAIN_SECONDS", 0.05)
    engine.stop()
    assert frontend.http.get("/v1/requests/a").status_code == 503


def test_the_page_and_its_files(frontend: RunningFrontend) -> None:
    page = frontend.http.get("/")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    linked = re.findall(r'(?:src|href)="(/[^"]+)"', page.text)
    assert len(linked) >= 3
    for path in linked:
        response = frontend.http.get(path)
        assert response.status_code == 200, path
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["content-security-policy"] == page.headers["content-security-policy"]
    assert frontend.http.get("/static/nope.js").status_code == 404
    assert frontend.http.get("/static/%2e%2e/app.py").status_code == 404


def test_the_page_asks_nobody_but_this_server() -> None:
    files = [path for path in STATIC.rglob("*") if path.is_file()]
    assert len(files) > 5
    for path in files:
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "://" not in text, path
        assert not re.search(UNSAFE, text), path


def test_every_source_file_that_the_page_names_exists() -> None:
    root = STATIC.parents[1]
    named = {
        name
        for path in STATIC.rglob("*")
        if path.suffix in {".html", ".js"}
        for name in re.findall(r"(?:engine_core|frontend|minivllm)/\w+\.py", path.read_text())
    }
    assert len(named) > 4
    assert [name for name in sorted(named) if not (root / name).is_file()] == []


def test_the_page_is_open_and_what_it_shows_is_not(engine: FakeEngine, start_frontend: StartFrontend) -> None:
    guarded = start_frontend(api_key="secret", enable_debug=True)
    assert [guarded.http.get(path).status_code for path in ("/", "/static/js/main.js", "/static/page.css")] == [200] * 3
    for path in (EVENTS, "/v1/requests/x", "/debug/trace", "/static", "/statics"):
        assert guarded.http.get(path, follow_redirects=False).status_code == 401, path


def test_a_trace_over_http(engine: FakeEngine, start_frontend: StartFrontend) -> None:
    frontend = start_frontend(enable_debug=True)
    frontend.wait_until_ready()
    engine.show(view(3.0, [], []))  # before anybody looks
    with socket.create_connection(frontend.address, timeout=TIMEOUT) as connection:
        connection.sendall(b"GET /debug/trace?seconds=0.6 HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n")
        engine.wait_for(lambda: engine.num_watches)
        engine.show(view(3.0, [prefill(1, 2.0, 1, 0, 5, sampled=[1]), decode(2, 2.5, [1])], [row(1, "r")]))
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    names = [event["name"] for event in json.loads(body)["traceEvents"] if event["ph"] == "X"]
    assert {"prefill", "decode", "prefill 0:5"} <= set(names)


@pytest.mark.parametrize("seconds", ["0", "-1", "61", "nan", "x"])
def test_a_trace_of_impossible_length(seconds: str, engine: FakeEngine, start_frontend: StartFrontend) -> None:
    response = start_frontend(enable_debug=True).http.get("/debug/trace", params={"seconds": seconds})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "seconds")


def test_without_enable_debug_there_is_no_trace(frontend: RunningFrontend) -> None:
    assert frontend.http.get("/debug/trace").status_code == 404


def test_a_trace_file_is_whole_json(tmp_path: Path, engine: FakeEngine, start_frontend: StartFrontend) -> None:
    path = tmp_path / "trace.json"
    frontend = start_frontend(trace_file=path)
    frontend.wait_until_ready()
    engine.wait_for(lambda: engine.num_watches)
    engine.show(view(3.0, [decode(1, 2.0, [1]), decode(2, 2.5, None)], [row(1, "r")]))
    engine.wait_for(lambda: b'"decode"' in path.read_bytes())
    frontend.call(frontend.frontend.stop)
    frontend.join()
    events = json.loads(path.read_text())
    assert [event["args"]["step"] for event in events if "step" in event["args"]] == [1, 2]
