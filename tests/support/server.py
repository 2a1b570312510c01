"""The real server, all its processes, as a client and an operator see it: requests, /metrics, process ids, signals."""

import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from minivllm.local_server import COMMAND, LocalServer
from tests.support.events import parse_events

WAIT = 60.0  # seconds until something that must happen counts as never happening
_POLL = 0.02


@dataclass(frozen=True)
class Metrics:
    """What /metrics said of the engine core at `time` (monotonic)."""

    time: float
    samples: dict[str, float]  # name, or name{label value}

    def __getitem__(self, name: str) -> float:
        return self.samples[name]

    @property
    def num_running(self) -> int:
        return int(self["vllm:num_requests_running"])

    @property
    def num_waiting(self) -> int:
        return int(self["vllm:num_requests_waiting"])

    @property
    def num_used_blocks(self) -> int:
        return int(self["minivllm:kv_blocks{used}"])

    @property
    def num_submitted(self) -> int:
        return int(self["minivllm:requests_submitted_total"])

    @property
    def finished(self) -> dict[str, int]:
        """Ended requests by reason, as the engine core counts them."""
        return self._by_label("minivllm:requests_finished_total")

    @property
    def answered(self) -> dict[str, int]:
        """Ended requests by reason, as the frontends count them."""
        return self._by_label("vllm:request_success_total")

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left of any request, and every one of them is accounted for."""
        left = (self.num_running, self.num_waiting, self.num_used_blocks, self["minivllm:kv_blocks_leaked"])
        return not any(left) and self.num_submitted == sum(self.finished.values())

    def _by_label(self, name: str) -> dict[str, int]:
        return {
            key.removeprefix(name).strip("{}"): int(value)
            for key, value in self.samples.items()
            if key.startswith(name + "{")
        }


class ServerProcess(LocalServer):
    """`minivllm serve`, or another `command` that starts a server on --port."""

    def __init__(self, *options: str, command: tuple[str, ...] = COMMAND) -> None:
        super().__init__(*options, command=command, stop_timeout=WAIT)
        self._http: httpx.Client | None = None

    @property
    def http(self) -> httpx.Client:
        if self._http is None:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)  # a connection per request
            self._http = httpx.Client(base_url=self.url, timeout=WAIT, limits=limits)
        return self._http

    @property
    def address(self) -> tuple[str, int]:
        url = httpx.URL(self.url)
        return url.host, url.port or 80

    def generate(self, **body: Any) -> dict[str, Any]:
        """POST /generate, whole answer."""
        response = self.http.post("/generate", json={"stream": False, "temperature": 0, **body})
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    @contextmanager
    def stream(self, **body: Any) -> Iterator[Iterator[Any]]:
        """POST /generate, event by event; leaving the block closes the connection."""
        with self.http.stream("POST", "/generate", json={"temperature": 0, **body}) as response:
            assert response.status_code == 200, response.read()
            yield parse_events(response.iter_lines())

    def connect(self, **body: Any) -> socket.socket:
        """A connection over which a request was sent, so that a test can leave as it likes."""
        payload = json.dumps({"temperature": 0, **body}).encode()
        connection = socket.create_connection(self.address, timeout=WAIT)
        head = f"POST /generate HTTP/1.1\r\nHost: test\r\nContent-Length: {len(payload)}\r\n\r\n"
        connection.sendall(head.encode() + payload)
        return connection

    def metrics(self) -> Metrics:
        asked = time.monotonic()
        text = self.http.get("/metrics").text
        samples = {
            sample.name + _label(sample.labels): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if not sample.name.endswith("_bucket")
        }
        return Metrics(asked - samples["minivllm:engine_stats_age_seconds"], samples)

    def wait_for_metrics(self, what: str, condition: Callable[[Metrics], bool]) -> Metrics:
        """Numbers that the engine core reported after this call, and for which `condition` holds."""
        start = time.monotonic()
        metrics = self.metrics()
        while not (metrics.time > start and condition(metrics)):
            if time.monotonic() > start + WAIT:
                raise TimeoutError(f"never {what}: {metrics.samples}")
            time.sleep(_POLL)
            metrics = self.metrics()
        return metrics

    def settle(self) -> Metrics:
        """Wait until nothing is left of any request: the integrity check that ends every test."""
        return self.wait_for_metrics("idle", lambda metrics: metrics.is_idle)

    def processes(self) -> dict[str, psutil.Process]:
        """The running children by name: engine_core, frontend-<pid>."""
        found = {}
        for child in psutil.Process(self.process.pid).children():
            module = child.cmdline()[child.cmdline().index("-m") + 1]
            found[module if module == "engine_core" else f"{module}-{child.pid}"] = child
        return found

    @property
    def engine_core(self) -> psutil.Process:
        return self.processes()["engine_core"]

    @property
    def frontends(self) -> list[psutil.Process]:
        return [process for name, process in self.processes().items() if name.startswith("frontend")]

    def socket_dir(self) -> Path:
        command = self.engine_core.cmdline()
        return Path(command[command.index("--config") + 1]).parent

    def wait_for_log(self, pattern: str) -> None:
        """Wait for a line in its log that `pattern` is found in, unless it is there."""
        wait_until(f"{pattern!r} in the log", lambda: any(re.search(pattern, line) for line in self.log))

    def wait_until_serving(self) -> None:
        """Wait while its frontend starts (the listening socket holds connections meanwhile) or its model loads."""
        wait_until("ready", lambda: self.http.get("/ready").status_code == 200)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._http is not None:
            self._http.close()
        super().__exit__(kind, error, traceback)


def wait_until(what: str, condition: Callable[[], bool]) -> None:
    """Look until `condition` holds. Raises `TimeoutError` after `WAIT` seconds."""
    deadline = time.monotonic() + WAIT
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"never {what}")
        time.sleep(_POLL)


def token_ids_of(events: list[Any]) -> list[int]:
    """All token ids of a whole stream, which must have ended properly."""
    assert events[-1] == "[DONE]"
    assert [event["finish_reason"] for event in events[:-2]] == [None] * (len(events) - 2)
    assert events[-2]["finish_reason"] is not None
    return [token for event in events[:-1] for token in event["token_ids"]]


def kill(process: psutil.Process) -> None:
    """SIGKILL, and wait until it is gone."""
    os.kill(process.pid, signal.SIGKILL)
    assert psutil.wait_procs([process], timeout=WAIT)[1] == []


def _label(labels: dict[str, str]) -> str:
    value = ",".join(value for name, value in labels.items() if name not in {"model_name", "engine"})
    return f"{{{value}}}" if value else ""
