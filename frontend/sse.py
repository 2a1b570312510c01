"""Server-sent events: one `data:` line per event, comments to keep a silent stream alive, `[DONE]` at the end."""

import asyncio
from collections.abc import AsyncIterator

from starlette.types import Scope, Send

from frontend.http_protocol import WRITE_CHUNK, ChunkWriter

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would otherwise collect events before passing them on
]


def event(payload: bytes) -> bytes:
    """One event that carries `payload` (JSON, so without line breaks)."""
    return b"data: " + payload + b"\n\n"


async def send_events(
    send: Send, events: AsyncIterator[bytes], headers: dict[str, str], scope: Scope | None = None
) -> None:
    """Write a whole event-stream response; waits while the client's socket is full.

    The events are written by a task of their own: it is woken for every token, and waking this one would each time
    walk down the ten coroutines of server and middleware that await it.
    scope: the request's, where the server may offer its short cut.
    """
    extra = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": 200, "headers": _HEADERS + extra})
    extensions = (scope or {}).get("extensions") or {}
    await asyncio.create_task(_write_events(extensions.get(WRITE_CHUNK) or _chunk_writer(send), events))
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _write_events(write: ChunkWriter, events: AsyncIterator[bytes]) -> None:
    async for data in events:
        await write(data)


def _chunk_writer(send: Send) -> ChunkWriter:
    """For any ASGI server."""

    async def write(data: bytes) -> None:
        await send({"type": "http.response.body", "body": data, "more_body": True})

    return write
