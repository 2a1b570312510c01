"""Clients that leave, at every stage of a request: the engine forgets them at once and every count returns to zero."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import pytest

from tests.support.server import ServerProcess

LONG = {"prompt": "Once upon a time", "max_tokens": 4000, "ignore_eos": True}


@pytest.fixture(scope="module")
def small_server(default_model_dir: Path) -> Iterator[ServerProcess]:
    """Runs two requests at a time, so that a third one waits."""
    with ServerProcess(str(default_model_dir), "--max-num-seqs", "2") as server:
        yield server


def expect_aborts(server: ServerProcess, before: int, count: int) -> None:
    """Nothing is left, and `count` more requests than `before` ended with abort."""
    metrics = server.settle()
    assert metrics.finished.get("abort", 0) - before == count
    assert metrics.answered.get("abort", 0) == metrics.finished.get("abort", 0)


def num_aborted(server: ServerProcess) -> int:
    return server.settle().finished.get("abort", 0)


def test_leaves_a_stream_midway(small_server: ServerProcess) -> None:
    before = num_aborted(small_server)
    with small_server.stream(**LONG) as events:
        assert all(event["finish_reason"] is None for event in islice(events, 3))
    expect_aborts(small_server, before, 1)


def test_resets_a_stream_midway(small_server: ServerProcess) -> None:
    before = num_aborted(small_server)
    with small_server.connect(**LONG) as connection:
        assert connection.recv(1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # RST instead of FIN
    expect_aborts(small_server, before, 1)


def test_leaves_while_a_whole_answer_is_made(small_server: ServerProcess) -> None:
    before = num_aborted(small_server)
    with small_server.connect(**LONG, stream=False):
        small_server.wait_for_metrics("running", lambda metrics: metrics.num_running == 1)
    expect_aborts(small_server, before, 1)


@pytest.mark.parametrize("stream", [True, False])
def test_leaves_while_queued(small_server: ServerProcess, stream: bool) -> None:
    before = num_aborted(small_server)
    with ExitStack() as running:
        for _ in range(2):
            running.enter_context(small_server.connect(**LONG)).recv(1)
        with small_server.connect(**LONG, stream=stream):
            small_server.wait_for_metrics("waiting", lambda metrics: metrics.num_waiting == 1)
        metrics = small_server.wait_for_metrics("left the queue", lambda metrics: metrics.num_waiting == 0)
        assert metrics.num_running == 2  # the others did not notice
    expect_aborts(small_server, before, 3)


def test_leaves_before_the_headers_are_complete(small_server: ServerProcess) -> None:
    before = small_server.settle().num_submitted
    for head in (b"", b"POST /gen", b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n", b'{"prompt"'):
        with socket.create_connection(small_server.address) as connection:
            connection.sendall(head)
    assert small_server.settle().num_submitted == before


def test_leaves_right_after_the_request(small_server: ServerProcess) -> None:
    before = small_server.settle()
    for _ in range(20):
        small_server.connect(**LONG).close()
    small_server.generate(prompt="x", max_tokens=1)
    after = small_server.settle()
    submitted = after.num_submitted - before.num_submitted
    assert 1 <= submitted <= 21
    assert after.finished.get("abort", 0) - before.finished.get("abort", 0) == submitted - 1


def test_queue_goes_on_when_running_ones_leave(small_server: ServerProcess) -> None:
    with ExitStack() as running:
        for _ in range(2):
            running.enter_context(small_server.connect(**LONG)).recv(1)
        with small_server.connect(prompt="Hello", max_tokens=2, stream=False) as waiting:
            small_server.wait_for_metrics("waiting", lambda metrics: metrics.num_waiting == 1)
            running.close()
            assert waiting.recv(12) == b"HTTP/1.1 200"
    small_server.settle()
