"""Server-sent events: one `data:` line per event, comments to keep a silent stream alive, `[DONE]` at the end."""

import asyncio
from collections.abc import AsyncIterator

from starlette.types import Send

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


async def send_events(send: Send, events: AsyncIterator[bytes], headers: dict[str, str]) -> None:
    """Write a whole event-stream response; `send` waits while the client's socket is full.

    The events are written by a task of their own: it is woken for every token, and waking this one would each time
    walk down the ten coroutines of server and middleware that await it.
    """
    extra = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": 200, "headers": _HEADERS + extra})
    await asyncio.create_task(_write_events(send, events))


async def _write_events(send: Send, events: AsyncIterator[bytes]) -> None:
    async for data in events:
        await send({"type": "http.response.body", "body": data, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})
