"""A client that measures: it sends a request and notes when each event of the answer arrives."""

import asyncio
import time
from collections.abc import Callable

import msgspec

from minivllm.bench.serving.connection import ConnectionPool
from minivllm.bench.serving.endpoints import Endpoint, Event, Usage
from minivllm.bench.serving.messages import Sample

_OK = 200
_MAX_SHOWN = 300  # characters of an error's body


class EventStream:
    """Reads a server-sent event stream while it arrives. Events that come in one piece arrived at one moment."""

    def __init__(self, decode: Callable[[bytes], Event], on_tokens: Callable[[int], None]) -> None:
        self._decode = decode
        self._on_tokens = on_tokens
        self._rest = b""
        self.status = 0
        self.event_times: list[float] = []
        self.num_tokens = 0
        self.usage: Usage | None = None
        self.error: str | None = None
        self.is_done = False

    def on_status(self, status: int) -> None:
        self.status = status

    def feed(self, data: bytes) -> None:
        """A piece of the body. What follows `[DONE]` is ignored."""
        now = time.monotonic()
        if self._rest:
            data = self._rest + data
        if self.status != _OK:
            self._rest = data
            return
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        *events, self._rest = data.split(b"\n\n")
        for event in events:
            if event.startswith(b"data:"):
                self._read(event[5:].lstrip(), now)

    def finish(self) -> None:
        """Nothing more will come: what is missing becomes the error."""
        if self.status != _OK:
            body = self._rest.decode(errors="replace")[:_MAX_SHOWN]
            self.error = f"HTTP {self.status}: {_message_of(body)}"
        elif self.error is None and not self.is_done:
            self.error = "the stream ended without [DONE]"
        elif self.error is None and not self.event_times:
            self.error = "the stream brought no output"

    def _read(self, payload: bytes, now: float) -> None:
        if self.is_done or payload == b"[DONE]":
            self.is_done = True
            return
        try:
            event = self._decode(payload)
        except msgspec.MsgspecError as error:
            self.error = f"an event that cannot be read: {error}"
            return
        num_tokens = event.num_tokens
        if num_tokens:
            self.event_times.append(now)
            self.num_tokens += num_tokens
            self._on_tokens(num_tokens)
        if event.usage is not None:
            self.usage = event.usage
        if event.error is not None:
            self.error = _text_of(event.error)


class Client:
    """Sends requests to one server. on_tokens: told how many tokens each event brings."""

    def __init__(
        self, pool: ConnectionPool, endpoint: Endpoint, timeout: float, on_tokens: Callable[[int], None]
    ) -> None:
        self._pool = pool
        self._endpoint = endpoint
        self._timeout = timeout
        self._on_tokens = on_tokens

    async def measure(self, payload: bytes) -> Sample:
        """One request, from before a connection is looked for to the end of its answer. A failure is a sample too."""
        start = time.monotonic()
        stream = EventStream(self._endpoint.decode, self._on_tokens)
        try:
            async with asyncio.timeout(self._timeout):
                await self._pool.exchange(payload, stream)
        except TimeoutError:
            stream.error = f"no end within {self._timeout:g} s"
        except OSError as error:
            if not stream.is_done:  # a server may end its answer by closing the connection
                stream.error = str(error) or type(error).__name__
        if stream.status:
            stream.finish()
        return _sample(start, stream)


def _sample(start: float, stream: EventStream) -> Sample:
    usage = stream.usage or Usage(0, stream.num_tokens)
    return Sample(
        start,
        time.monotonic(),
        stream.event_times,
        usage.completion_tokens,
        usage.prompt_tokens,
        usage.num_cached_tokens,
        stream.usage is not None,
        stream.error,
    )


def _message_of(body: str) -> str:
    """The message in an error's JSON, or the body as it is."""
    try:
        content = msgspec.json.decode(body)
    except msgspec.MsgspecError:
        return body
    return _text_of(content["error"]) if isinstance(content, dict) and "error" in content else body


def _text_of(error: object) -> str:
    return str(error["message"]) if isinstance(error, dict) and "message" in error else str(error)
