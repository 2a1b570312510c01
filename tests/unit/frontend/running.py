"""A real frontend (uvicorn, sockets and all) in a thread of the test, and the raw HTTP clients that tests need."""

import asyncio
import json
import socket
import threading
import time
from pathlib import Path
from typing import Any, Self
from unittest.mock import Mock

import httpx
from starlette.routing import Route

from frontend.app import make_app
from frontend.server import Frontend
from frontend.tokenizer import Tokenizer
from minivllm.config import ServeConfig
from minivllm.control import ControlChannel
from minivllm.listener import open_listener
from minivllm.transport import Endpoints
from tests.support.events import parse_events

TIMEOUT = 20.0


class RunningFrontend:
    """A context manager; `http` is a client of it."""

    def __init__(
        self,
        socket_dir: Path,
        tokenizer_dir: Path,
        engine_timeout: float = 30.0,
        stream_ping_interval: float = 5.0,
        control: ControlChannel | None = None,
        **options: Any,
    ) -> None:
        self.config = ServeConfig(model=str(tokenizer_dir), port=0, served_model_name="test-model", **options)
        self._listener = open_listener(self.config)
        self.address = self._listener.getsockname()
        self.frontend = Frontend(
            self.config,
            Tokenizer.from_directory(tokenizer_dir),
            Endpoints.in_directory(socket_dir),
            self._listener,
            control or ControlChannel(None),
            engine_timeout=engine_timeout,
            stream_ping_interval=stream_ping_interval,
        )
        self._thread = threading.Thread(target=lambda: asyncio.run(self.frontend.run()), name="frontend")
        self.http = httpx.Client(base_url=f"http://{self.address[0]}:{self.address[1]}", timeout=TIMEOUT)

    def __enter__(self) -> Self:
        self._thread.start()
        self.http.get("/health")  # the socket listens already: this waits for the answer
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        if self._thread.is_alive():
            self.call(self.frontend.stop_now)
        self._thread.join()

    def call(self, action: Any) -> None:
        """Run `action` on the frontend's event loop."""
        self.frontend._call(action)

    def join(self) -> None:
        """Wait until it has shut down by itself."""
        self._thread.join(TIMEOUT)
        if self._thread.is_alive():
            raise TimeoutError("the frontend did not shut down")

    def wait_for(self, path: str, status: int) -> dict[str, Any]:
        """Ask until `path` answers with `status`; the body."""
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline:
            response = self.http.get(path)
            if response.status_code == status:
                body: dict[str, Any] = response.json()
                return body
        raise TimeoutError(f"{path} does not answer {status}")

    def wait_until_ready(self) -> None:
        self.wait_for("/ready", 200)

    def is_idle(self) -> bool:
        """Whether all requests have ended, given a moment."""
        idle = self.frontend._engine.wait_until_idle(TIMEOUT)
        return asyncio.run_coroutine_threadsafe(idle, self.frontend._loop).result(TIMEOUT + 1)

    def generate(self, **body: Any) -> httpx.Response:
        """POST /generate, whole response."""
        return self.http.post("/generate", json=body)

    def events(self, path: str = "/generate", **body: Any) -> list[Any]:
        """All events of a stream: objects, and "[DONE]"."""
        with self.http.stream("POST", path, json=body) as response:
            assert response.status_code == 200, response.read()
            return list(parse_events(response.iter_lines()))

    def routes(self) -> set[tuple[str, str]]:
        """(method, path) of every route of the application."""
        return {
            (method.lower(), route.path.replace(":path}", "}"))
            for route in make_app(self.config, Mock(), Mock(), Mock()).routes
            if isinstance(route, Route)
            for method in route.methods or ()
            if method != "HEAD"
        }

    def open_raw(self, path: str = "/generate", **body: Any) -> socket.socket:
        """Send a request by hand and return the connection, so that a test can leave as it likes."""
        payload = json.dumps(body).encode()
        connection = socket.create_connection(self.address, timeout=TIMEOUT)
        head = f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Length: {len(payload)}\r\n\r\n"
        connection.sendall(head.encode() + payload)
        return connection


def text_of(events: list[Any]) -> str:
    """The text of a whole stream, which must have ended properly."""
    assert events[-1] == "[DONE]"
    assert all(event["finish_reason"] is None for event in events[:-2])
    assert events[-2]["finish_reason"] is not None
    return "".join(event["text"] for event in events[:-1])


def read_until(connection: socket.socket, end: bytes, size: int = 65536) -> bytes:
    """What arrives up to and including `end`, read in pieces of `size` bytes."""
    received = b""
    while end not in received:
        piece = connection.recv(size)
        assert piece, f"the connection ended after {received!r}"
        received += piece
    return received
