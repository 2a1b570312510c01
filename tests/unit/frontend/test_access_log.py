"""--enable-access-log: one line for each request, whatever became of it."""

import logging
import re
from collections.abc import Callable

import pytest

from tests.support.fake_engine import FakeEngine
from tests.support.server import wait_until
from tests.unit.frontend.running import RunningFrontend

Start = Callable[..., RunningFrontend]


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Without their times."""
    found = [record.getMessage() for record in caplog.records if record.name == "frontend.access_log"]
    return [re.sub(r"\d+\.\d ms", "… ms", line) for line in found]


def forget_the_start(frontend: RunningFrontend, caplog: pytest.LogCaptureFixture) -> None:
    """A line is written after the answer: wait for that of the last request."""
    frontend.wait_until_ready()
    wait_until("logged", lambda: "- GET /ready 200 … ms" in lines(caplog))
    caplog.clear()


def test_a_line_for_each_request(engine: FakeEngine, start_frontend: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    frontend = start_frontend(enable_access_log=True)
    forget_the_start(frontend, caplog)
    post = frontend.http.post
    post("/generate", json={"prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True, "request_id": "mine"})
    post("/v1/completions", json={"prompt": [[5, 6], [7]], "max_tokens": 2, "n": 2, "request_id": "two"})
    post("/v1/completions", json={"prompt": ""})
    frontend.http.get("/health?token=secret")
    frontend.http.get("/a%0Ab", headers={"X-Request-Id": "my-id"})
    wait_until("logged", lambda: len(lines(caplog)) == 5)
    assert lines(caplog) == [
        "mine POST /generate 200 … ms, 3 + 4 tokens",
        "cmpl-two POST /v1/completions 200 … ms, 3 + 8 tokens",
        "- POST /v1/completions 400 … ms",
        "- GET /health 200 … ms",
        "my-id GET /a%0Ab 404 … ms",
    ]


def test_a_client_that_leaves(engine: FakeEngine, start_frontend: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    frontend = start_frontend(enable_access_log=True)
    forget_the_start(frontend, caplog)
    with frontend.open_raw(prompt="hello", max_tokens=200) as connection:
        connection.recv(10)
    wait_until("logged", lambda: bool(lines(caplog)))
    [left] = lines(caplog)
    assert re.fullmatch(r"gen-\w+ POST /generate 200 … ms, \d+ \+ \d+ tokens", left)


def test_none_by_default(engine: FakeEngine, start_frontend: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    frontend = start_frontend()
    frontend.wait_until_ready()
    frontend.http.get("/health")
    assert lines(caplog) == []
