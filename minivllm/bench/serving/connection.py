"""Connections to the server: raw asyncio and httptools, because a general HTTP client costs more than the tokens do."""

import asyncio
import ssl
from typing import Protocol, cast

import httptools

from minivllm.bench.serving.target import Address


class Response(Protocol):
    """Who gets the answer, piece by piece."""

    def on_status(self, status: int) -> None: ...

    def feed(self, data: bytes) -> None: ...


class Connection(asyncio.Protocol):
    """One keep-alive connection, one exchange at a time. Made by `ConnectionPool`."""

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._response: Response | None = None
        self._ended: asyncio.Future[None] | None = None
        self.num_exchanges = 0
        self.has_answered = False  # anything at all of the exchange that runs
        self.is_usable = False

    async def exchange(self, request: bytes, response: Response) -> None:
        """Send, and return when the whole answer was fed to `response`. Raises `ConnectionError`."""
        if self._transport is None or not self.is_usable:
            raise ConnectionError("the server closed the connection")
        self.num_exchanges += 1
        self.has_answered = False
        self._response = response
        self._ended = asyncio.get_running_loop().create_future()
        self.is_usable = False  # until the answer has ended
        self._transport.write(request)
        await self._ended

    def close(self) -> None:
        self.is_usable = False
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.is_usable = True

    def data_received(self, data: bytes) -> None:
        self.has_answered = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(ConnectionError(f"the server does not speak HTTP: {error}"))

    def connection_lost(self, error: Exception | None) -> None:
        self.is_usable = False
        self._fail(ConnectionError("the server closed the connection"))

    def on_headers_complete(self) -> None:
        if self._response is not None:
            self._response.on_status(self._parser.get_status_code())

    def on_body(self, body: bytes) -> None:
        if self._response is not None:
            self._response.feed(body)

    def on_message_complete(self) -> None:
        self.is_usable = self._parser.should_keep_alive()
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)

    def _fail(self, error: ConnectionError) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_exception(error)


class ConnectionPool:
    """Connections that are idle are used again, as a client in production would."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._tls = ssl.create_default_context() if address.tls else None
        self._idle: list[Connection] = []

    async def exchange(self, request: bytes, response: Response) -> None:
        """One request over an idle connection or a new one. Raises `OSError`, of which `ConnectionError` is one."""
        connection = await self._take()
        try:
            try:
                await connection.exchange(request, response)
            except ConnectionError:
                if connection.num_exchanges == 1 or connection.has_answered:
                    raise
                # The server ended the idle connection just as the request left: that says nothing about the request.
                connection = await self._connect()
                await connection.exchange(request, response)
        except BaseException:
            connection.close()
            raise
        if connection.is_usable:
            self._idle.append(connection)
        else:
            connection.close()

    def close(self) -> None:
        """Close the idle ones."""
        while self._idle:
            self._idle.pop().close()

    async def _take(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_usable:
                return connection
        return await self._connect()

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        host, port = self._address.host, self._address.port
        _, connection = await loop.create_connection(Connection, host, port, ssl=self._tls)
        return connection
