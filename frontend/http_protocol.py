"""uvicorn's HTTP protocol with a short cut: a response that streams may write its body straight to the connection.

ASGI's `send` passes through a coroutine per layer of middleware and uvicorn's checks of every message: an eighth
of what a token costs. Head and end of a response still go that way.
"""

from collections.abc import Awaitable, Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

WRITE_CHUNK = "minivllm.write_chunk"  # name of the ASGI extension

ChunkWriter = Callable[[bytes], Awaitable[None]]


class StreamingHttpProtocol(HttpToolsProtocol):
    """Offers `WRITE_CHUNK` in every scope: for a response without content-length, so in chunked encoding."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        scope: Any = self.scope  # its type knows no extensions but its own
        scope["extensions"] = {WRITE_CHUNK: self._write_chunk}

    async def _write_chunk(self, data: bytes) -> None:
        """Waits while the client's socket is full; does nothing once the client has left."""
        if self.flow.write_paused:
            await self.flow.drain()
        if not self.transport.is_closing():
            self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
