"""The limits that uvicorn lacks: slow senders, endless headers, too many connections.

connection ─▶ headers complete ─▶ body complete ─▶ response ─▶ next request, or idle for uvicorn's timeout_keep_alive
           └─── in time ────────┴─── in time ───┘
"""

import asyncio
import json
from http import HTTPStatus

from frontend.http_protocol import StreamingHttpProtocol

MAX_HEADER_BYTES = 64 * 1024


class GuardedProtocol(StreamingHttpProtocol):
    """One connection. A client that breaks a limit is told so, if it is not being answered already, and cut off.

    request_timeout: seconds for the headers of a request, and as many for its body. max_connections: open at once.
    """

    request_timeout: float
    max_connections: int

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._deadline: asyncio.TimerHandle | None = None
        super().connection_made(transport)
        self._begin_headers()
        if len(self.connections) > self.max_connections:
            self._refuse(503, f"{self.max_connections} connections are open already (--limit-concurrency)")

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_deadline()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # uvicorn leaves it running, and so all that is here, after a reset
        self.cycle = self.scope = None  # type: ignore[assignment]  # they lead back here: only the collector would end it

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._deadline is None and not self._is_answering() and self.timeout_keep_alive_task is None:
            self._begin_headers()  # line breaks between requests end uvicorn's timeout, but begin nothing
        if self._in_headers and not self.transport.is_closing():
            self._num_header_bytes += len(data)
            if self._num_header_bytes > MAX_HEADER_BYTES:
                self._refuse(431, f"the headers are larger than {MAX_HEADER_BYTES} bytes")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._begin_headers()

    def on_headers_complete(self) -> None:
        self._in_headers = False
        self._expect("body")
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._cancel_deadline()
        super().on_message_complete()

    def _begin_headers(self) -> None:
        self._in_headers = True
        self._num_header_bytes = 0
        self._expect("headers")

    def _expect(self, part: str) -> None:
        self._cancel_deadline()
        self._deadline = self.loop.call_later(self.request_timeout, self._on_timeout, part)

    def _on_timeout(self, part: str) -> None:
        is_next = self.pipeline or part == "headers"  # of a request that waits until the one before it is answered
        if self._is_answering() and (is_next or self.flow.read_paused):
            self._expect(part)
        else:
            self._refuse(408, f"the {part} did not arrive within {self.request_timeout:g} s (--request-timeout)")

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete  # type: ignore[redundant-expr]

    def _cancel_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _refuse(self, status: int, message: str) -> None:
        self._cancel_deadline()
        if self.transport.is_closing():
            return
        if not self._is_answering() or not self.cycle.response_started:
            self.transport.write(_response(status, message))
        self.transport.close()


def guarded_protocol(request_timeout: float, max_connections: int) -> type[GuardedProtocol]:
    """The protocol class for uvicorn, with its limits."""
    limits = {"request_timeout": request_timeout, "max_connections": max_connections}
    return type("GuardedProtocol", (GuardedProtocol,), limits)


def _response(status: int, message: str) -> bytes:
    kind = "overloaded_error" if status == 503 else "invalid_request_error"
    body = json.dumps({"error": {"message": message, "type": kind, "param": None, "code": None}})
    retry = "Retry-After: 1\r\n" if status == 503 else ""
    return (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n{retry}Connection: close\r\n\r\n{body}"
    ).encode()
