"""Notices at any moment that a client has left, so that its request can be aborted at once."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from starlette.types import Receive


class Disconnect:
    """`gone` once the client has left; `callback`, if set, is called at that moment."""

    def __init__(self) -> None:
        self.gone = False
        self.callback: Callable[[], None] | None = None

    async def watch(self, receive: Receive) -> None:
        """Wait for the end of the connection. Only after the body was read."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        if self.callback is not None:
            self.callback()


@asynccontextmanager
async def watch_disconnect(receive: Receive) -> AsyncIterator[Disconnect]:
    """Watch inside the block."""
    disconnect = Disconnect()
    task = asyncio.create_task(disconnect.watch(receive))
    try:
        yield disconnect
    finally:
        task.cancel()
