"""`python -m frontend` as a process: lean, quick to start, and gone when it should be."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support.fake_engine import FakeEngine
from tests.unit.frontend.running import read_until

ROOT = Path(__file__).parents[3]
MAX_RSS = 120 * 2**20
Start = Callable[..., "Process"]


class Process:
    """A frontend process with a control line to this test."""

    def __init__(self, tokenizer_dir: Path, socket_dir: Path, *arguments: str, **environment: str) -> None:
        self.control, theirs = socket.socketpair()
        fds = [theirs.fileno(), *(int(value) for name, value in environment.items() if name.endswith("_FD"))]
        with theirs:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "frontend", str(tokenizer_dir), "--socket-dir", str(socket_dir), *arguments],
                cwd=ROOT,
                env={**os.environ, "MINIVLLM_CONTROL_FD": str(theirs.fileno()), **environment},
                pass_fds=fds,
                stderr=subprocess.PIPE,
                text=True,
            )
        self.control.settimeout(20)
        self._lines = self.control.makefile()

    def report(self) -> dict[str, str]:
        """The next line it sends to its launcher."""
        line: dict[str, str] = json.loads(self._lines.readline())
        return line

    def url(self) -> str:
        """Where it listens, once it does."""
        report = self.report()
        assert report["state"] == "ready", report
        return report["url"]

    def address(self) -> tuple[str, int]:
        host, port = self.url().removeprefix("http://").split(":")
        return host, int(port)

    def close(self) -> None:
        self.popen.kill()
        self.popen.communicate()
        self._lines.close()
        self.control.close()


@pytest.fixture
def start(tokenizer_dir: Path, socket_dir: Path) -> Iterator[Start]:
    with contextlib.ExitStack() as stack:

        def start(*arguments: str, **environment: str) -> Process:
            return stack.enter_context(
                contextlib.closing(Process(tokenizer_dir, socket_dir, *arguments, **environment))
            )

        yield start


def connect(process: Process, engine: FakeEngine, request_id: str) -> socket.socket:
    """A connection whose request waits in the engine core."""
    host, port = process.address()
    with httpx.Client(base_url=f"http://{host}:{port}") as client:
        while client.get("/ready").status_code != 200:
            pass
    body = json.dumps({"prompt": [70], "max_tokens": 3, "request_id": request_id})
    connection = socket.create_connection((host, port), timeout=20)
    connection.sendall(f"POST /generate HTTP/1.1\r\nHost: t\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
    engine.wait_for(lambda: request_id in engine.adds)
    return connection


def test_it_is_lean_and_serves_before_the_engine_is_there(start: Start) -> None:
    process = start("--port", "0")
    assert httpx.get(process.url() + "/ready").json()["status"] == "loading"
    assert psutil.Process(process.popen.pid).memory_info().rss < MAX_RSS


def test_it_imports_nothing_heavy() -> None:
    code = "import frontend.__main__, sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    modules = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {"torch", "transformers", "numpy", "pandas", "requests", "rich"}.isdisjoint(modules.split())
    assert "starlette" in modules.split()


def test_tokenizer_and_detokenizer_do_without_http() -> None:
    code = "import frontend.detokenizer, sys; print(*{name.partition('.')[0] for name in sys.modules})"
    modules = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {"starlette", "uvicorn"}.isdisjoint(modules.split())


def test_sigterm_lets_streams_finish(start: Start, engine: FakeEngine) -> None:
    engine.holding = True
    process = start("--port", "0")
    with connect(process, engine, "last") as connection:
        process.popen.send_signal(signal.SIGTERM)
        engine.holding = False
        assert b'"finish_reason":"length"' in read_until(connection, b"[DONE]")
    assert process.popen.wait(20) == 0


def test_a_second_signal_ends_at_once(start: Start, engine: FakeEngine) -> None:
    engine.holding = True
    process = start("--port", "0")
    with connect(process, engine, "stuck"):
        process.popen.send_signal(signal.SIGTERM)
        assert process.popen.stderr is not None
        while "1 requests are unfinished" not in process.popen.stderr.readline():
            assert process.popen.poll() is None
        process.popen.send_signal(signal.SIGTERM)
        assert process.popen.wait(20) == 0
    engine.wait_for(lambda: engine.aborted == ["stuck"])


def test_the_launchers_death_ends_it(start: Start, engine: FakeEngine) -> None:
    engine.holding = True
    process = start("--port", "0")
    with connect(process, engine, "orphan"):
        process.control.shutdown(socket.SHUT_RDWR)
        assert process.popen.wait(20) == 0
    engine.wait_for(lambda: engine.aborted == ["orphan"])


def test_a_port_in_use_is_told_to_the_launcher_alone(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = start("--port", str(port))
        report = process.report()
        assert report["state"] == "failed"
        assert str(port) in report["reason"]
        _, stderr = process.popen.communicate(timeout=20)
    assert process.popen.returncode == 1
    assert stderr == ""  # the launcher is the one that says why


def test_a_missing_socket_dir_is_a_start_up_failure(tokenizer_dir: Path) -> None:
    command = [sys.executable, "-m", "frontend", str(tokenizer_dir), "--port", "0"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False)
    assert result.returncode == 1
    assert re.fullmatch(r"minivllm: error: --socket-dir .*\n", result.stderr)


def test_frontends_share_an_inherited_socket(start: Start, engine: FakeEngine) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        port = listener.getsockname()[1]
        shared = {"MINIVLLM_LISTEN_FD": str(listener.fileno())}
        first, second = (start("--port", str(port), **shared) for _ in range(2))
        assert first.url() == second.url() == f"http://127.0.0.1:{port}"
        first.popen.send_signal(signal.SIGTERM)
        assert first.popen.wait(20) == 0
        assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200


def test_a_successor_listens_only_once_it_has_the_engine_core(start: Start, socket_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        shared = {"MINIVLLM_LISTEN_FD": str(listener.fileno()), "MINIVLLM_SUCCESSOR": "1"}
        successor = start("--port", url.rpartition(":")[2], **shared)
        with pytest.raises(httpx.ReadTimeout):  # the socket takes connections, the process does not
            httpx.get(f"{url}/health", timeout=3)
        with FakeEngine(socket_dir):
            assert successor.url() == url
            assert httpx.get(f"{url}/ready").status_code == 200


def test_a_waiting_successor_can_be_stopped(start: Start, socket_dir: Path) -> None:
    successor = start("--port", "0", MINIVLLM_SUCCESSOR="1")
    time.sleep(2)  # until it waits
    successor.popen.send_signal(signal.SIGTERM)
    assert successor.popen.wait(20) == 0


def test_a_retiring_frontend_finishes_its_streams_and_its_successor_refuses_nobody(
    start: Start, engine: FakeEngine
) -> None:
    engine.holding = True
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        port = listener.getsockname()[1]
        shared = {"MINIVLLM_LISTEN_FD": str(listener.fileno())}
        old = start("--port", str(port), **shared)
        with connect(old, engine, "last") as connection:
            new = start("--port", str(port), **shared)
            assert new.url()
            old.control.sendall(b'{"retire": true}\n')
            assert all(httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200 for _ in range(100))
            assert old.popen.poll() is None
            engine.holding = False
            assert b'"finish_reason":"length"' in read_until(connection, b"[DONE]")
        assert old.popen.wait(20) == 0
        assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
