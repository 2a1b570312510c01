"""Clients that mean harm, against a real frontend: refused or dropped, and nobody else notices."""

import gc
import json
import logging
import random
import re
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import psutil
import pytest

from frontend.connection_limits import MAX_HEADER_BYTES, GuardedProtocol
from frontend.tokenizer import Tokenizer
from tests.support.fake_engine import FakeEngine
from tests.unit.frontend.conftest import BACKENDS
from tests.unit.frontend.running import TIMEOUT, RunningFrontend, read_until

HEAD = b"POST /generate HTTP/1.1\r\nHost: x\r\n"
BODY = json.dumps({"prompt": "hello world", "max_tokens": 2, "stream": False}).encode()
MAX_GROWTH = 64 * 2**20  # 64 KiB a request: what is kept for good is far more or far less
Start = Callable[..., RunningFrontend]


def request(body: bytes) -> bytes:
    return HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def talk(frontend: RunningFrontend, payload: bytes, finish: bool = True) -> bytes:
    """All that the server answers until it closes the connection."""
    received = b""
    with socket.create_connection(frontend.address, timeout=TIMEOUT) as connection:
        try:
            connection.sendall(payload)
            if finish:
                connection.shutdown(socket.SHUT_WR)
            while piece := connection.recv(65536):
                received += piece
        except (BrokenPipeError, ConnectionResetError):  # refused before all was sent
            pass
    return received


def fuzz(rng: random.Random) -> bytes:
    """A request that is wrong in some way, and sometimes in none."""
    body = bytearray(BODY)
    match rng.randrange(8):
        case 0:
            for _ in range(rng.randint(1, 5)):
                body[rng.randrange(len(body))] = rng.randrange(256)
        case 1:
            body = bytearray(b'{"prompt":' * 1 + b"[" * rng.randint(1, 20_000))
        case 2:
            body = bytearray(b'{"prompt": "\xff\xfe\xc3("}')
        case 3:
            body = bytearray(b'{"prompt": "\\ud800", "max_tokens": 1}')
        case 4:
            body = bytearray(json.dumps({"prompt": "x", "stop": ["a" * 50] * rng.randint(65, 5000)}).encode())
        case 5:
            body = bytearray(json.dumps({"prompt": [2**31], "temperature": 1e400}).encode())
        case 6:
            raw = bytearray(request(bytes(body)))
            for _ in range(rng.randint(1, 10)):
                raw[rng.randrange(len(raw))] = rng.randrange(256)
            return bytes(raw)
        case 7:
            return rng.randbytes(rng.randint(1, 500)) + b"\r\n\r\n"
    return request(bytes(body))


def test_fuzzed_requests_are_refused_and_others_are_served(engine: FakeEngine, frontend: RunningFrontend) -> None:
    process, rng = psutil.Process(), random.Random(1)
    payloads = [fuzz(rng) for _ in range(1000)]
    talk(frontend, payloads[0])
    num_fds, memory = process.num_fds(), process.memory_info().rss
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda payload: talk(frontend, payload), payloads)
        good = [frontend.generate(prompt="hello world", max_tokens=5, stream=False) for _ in range(20)]
        statuses = Counter(answer[9:12].decode("latin-1") for answer in answers)
    assert {response.json()["usage"]["completion_tokens"] for response in good} == {5}
    assert all(status == "" or status[0] == "4" or status == "200" for status in statuses), statuses
    assert statuses["400"] > 500
    assert frontend.is_idle()
    assert process.num_fds() <= num_fds + 2  # the pool of the good client
    assert process.memory_info().rss < memory + MAX_GROWTH


@pytest.mark.parametrize(("part", "payload"), [("headers", b""), ("headers", HEAD), ("body", request(BODY)[:-5])])
def test_a_slow_sender_is_cut_off(engine: FakeEngine, start_frontend: Start, part: str, payload: bytes) -> None:
    frontend = start_frontend(request_timeout=0.3)
    frontend.wait_until_ready()
    answer = talk(frontend, payload, finish=False)
    assert b"HTTP/1.1 408 Request Timeout\r\n" in answer
    assert f"the {part} did not arrive within 0.3 s (--request-timeout)".encode() in answer
    assert frontend.is_idle()


def test_line_breaks_between_requests_keep_nothing_open(engine: FakeEngine, start_frontend: Start) -> None:
    frontend = start_frontend(request_timeout=0.2)
    with socket.create_connection(frontend.address, timeout=TIMEOUT) as connection:
        connection.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")
        read_until(connection, b"}")
        connection.sendall(b"\r\n")
        assert read_until(connection, b"}}").startswith(b"HTTP/1.1 408")


def test_a_slow_response_and_a_pipelined_request_are_not_cut_off(engine: FakeEngine, start_frontend: Start) -> None:
    frontend = start_frontend(request_timeout=0.2)
    frontend.wait_until_ready()
    engine.step_seconds = 0.1
    stream = HEAD + b"Content-Length: %d\r\n\r\n"
    body = json.dumps({"prompt": "hello", "max_tokens": 8}).encode()
    with socket.create_connection(frontend.address, timeout=TIMEOUT) as connection:
        connection.sendall(stream % len(body) + body + stream % 10 + b"1234")
        assert b'"finish_reason":"length"' in read_until(connection, b"[DONE]")


def closed_connections(server: tuple[str, int]) -> list[GuardedProtocol]:
    """What is still in memory of connections to `server` that are closed; other tests may have left theirs."""
    connections = [it for it in gc.get_objects() if issubclass(type(it), GuardedProtocol)]
    return [it for it in connections if it.server == server and it.transport.is_closing()]


@pytest.mark.parametrize("reset", [False, True])
def test_nothing_is_kept_of_a_connection_that_was_closed(frontend: RunningFrontend, reset: bool) -> None:
    gc.collect()  # what other tests left
    gc.disable()  # nothing that waits for the collector, either
    try:
        for _ in range(10):
            with frontend.open_raw(prompt="hello", max_tokens=1, stream=False) as connection:
                read_until(connection, b"}}")
                if reset:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        deadline = time.monotonic() + TIMEOUT  # shorter than uvicorn's timeout for idle connections
        while kept := closed_connections(frontend.address):
            assert time.monotonic() < deadline, [(it, gc.get_referrers(it)) for it in kept]
            del kept
            time.sleep(0.1)
    finally:
        gc.enable()


def test_endless_headers_are_refused(frontend: RunningFrontend) -> None:
    answer = talk(frontend, HEAD + b"X: y\r\n" * (2 * MAX_HEADER_BYTES // 6), finish=False)
    assert answer[:12] in {b"HTTP/1.1 431", b""}  # b"": cut off while it was still sending
    assert frontend.generate(prompt="hello", max_tokens=1).status_code == 200


def test_connections_are_limited(engine: FakeEngine, start_frontend: Start) -> None:
    frontend = start_frontend(limit_concurrency=3)
    frontend.wait_until_ready()
    held = [socket.create_connection(frontend.address, timeout=TIMEOUT) for _ in range(2)]  # and frontend.http
    try:
        answer = talk(frontend, b"", finish=False)
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"3 connections are open already (--limit-concurrency)" in answer
        assert frontend.http.get("/ready").status_code == 200
    finally:
        for connection in held:
            connection.close()


@pytest.mark.parametrize("path", ["/generate", "/tokenize", "/v1/completions", "/v1/chat/completions"])
def test_a_prompt_that_cannot_fit_is_refused_before_it_is_tokenized(
    frontend: RunningFrontend, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    def encode(*_: object) -> None:
        raise AssertionError("tokenized")

    monkeypatch.setattr(Tokenizer, "encode", encode)
    text = "hello " * (10 * 2**20 // 6)
    given = {"messages": [{"role": "user", "content": text}]} if "chat" in path else {"prompt": text}
    response = frontend.http.post(path, json=given)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] in given
    assert re.fullmatch(
        rf"{error['param']} has 1048\d{{4}} characters, but 256 tokens .* at most \d+", error["message"]
    )


def test_no_text_reaches_the_log(engine: FakeEngine, start_frontend: Start, caplog: pytest.LogCaptureFixture) -> None:
    """Of requests that are served, refused, malformed, cut off or left, at every endpoint, with all that is logged."""
    frontend = start_frontend(enable_log_requests=True, enable_access_log=True)
    frontend.wait_until_ready()
    secret = "hello-secret"
    bodies: list[dict[str, Any]] = [
        {"prompt": secret, "max_tokens": 2},
        {"prompt": secret, "max_tokens": 2, "stream": True},
        {"prompt": secret * 1_000_000},
        {"prompt": [secret]},
        {"prompt": secret, "stop": [secret] * 65},
        {secret: secret},
        {"messages": [{"role": "user", "content": secret}], "max_tokens": 2},
        {"messages": [{"role": secret, "content": secret}]},
        {"messages": secret, "tokens": [secret]},
    ]
    with caplog.at_level(logging.DEBUG):
        for path, body in product(sorted(path for method, path in frontend.routes() if method == "post"), bodies):
            frontend.http.post(path, json=body)
        for payload in (request(secret.encode()), request(b'{"prompt": "' + secret.encode()), secret.encode()):
            talk(frontend, payload)
        frontend.open_raw(prompt=secret, max_tokens=50).close()
        assert frontend.is_idle()
    assert sum("prompt tokens, max_tokens" in message for message in caplog.messages) >= 6
    assert "secret" not in caplog.text


@pytest.mark.parametrize("kind", BACKENDS)
def test_no_token_stands_for_more_text_than_is_assumed(kind: str) -> None:
    tokenizer = Tokenizer(BACKENDS[kind](), {})
    assert (tokenizer.max_token_bytes is not None) == (kind == "byte_level")
    for text in ("hello world, this is a small corpus " * 9, "e\u0301" * 99, "<|im_start|>plain added" * 9, " \n" * 50):
        most = tokenizer.max_token_bytes
        assert most is None or len(text.encode()) <= most * len(tokenizer.encode(text))
