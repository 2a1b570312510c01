"""Clients that ask again and again, compare every answer, and note how long nothing came."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import httpx

from minivllm.soak.answers import Answer, NoAnswerError, RefusedError, ask


class Load:
    """`num_clients` at once on `bodies`; `reference` holds the right answers, by index (see `learn`).

    num_right, wrong, failed, num_refused: what became of the requests so far. last_event: when, on `time.monotonic`.
    """

    def __init__(
        self, url: str, bodies: Sequence[dict[str, Any]], num_clients: int, reference: Sequence[Answer]
    ) -> None:
        self._http = _client(url)
        self._bodies = bodies
        self._num_clients = num_clients
        self._reference = reference
        self.num_right = 0
        self.num_refused = 0
        self.wrong: list[str] = []
        self.failed: list[str] = []
        self.last_event = 0.0
        self._news = asyncio.Event()

    async def run(self, until: asyncio.Event) -> None:
        """Ask until then; what has begun is finished."""
        await asyncio.gather(*(self._client(index, until) for index in range(self._num_clients)))

    async def next_event(self) -> float:
        """Wait for the next event of whichever client; its time."""
        self._news.clear()
        await self._news.wait()
        return self.last_event

    async def close(self) -> None:
        """Let go of all connections."""
        await self._http.aclose()

    async def _client(self, index: int, until: asyncio.Event) -> None:
        while not until.is_set():
            await self._ask_and_compare(index % len(self._bodies))
            index += self._num_clients + 1

    async def _ask_and_compare(self, index: int) -> None:
        try:
            answer = await ask(self._http, self._bodies[index], self._on_event)
        except RefusedError:
            self.num_refused += 1
            await asyncio.sleep(1.0)  # as Retry-After says
            return
        except (NoAnswerError, httpx.HTTPError) as error:
            self.failed.append(f"request {index}: {error!r}")
            return
        if answer == self._reference[index]:
            self.num_right += 1
        else:
            self.wrong.append(f"request {index}: {answer} instead of {self._reference[index]}")

    def _on_event(self, now: float) -> None:
        self.last_event = now
        self._news.set()


async def learn(url: str, bodies: Sequence[dict[str, Any]], num_clients: int) -> list[Answer]:
    """The right answers, from a server that nothing happens to."""
    places = asyncio.Semaphore(num_clients)
    async with _client(url) as http:

        async def one(body: dict[str, Any]) -> Answer:
            async with places:
                return await ask(http, body, lambda now: None)

        return await asyncio.gather(*map(one, bodies))


def _client(url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)  # a connection per request
    return httpx.AsyncClient(base_url=url, timeout=httpx.Timeout(600.0), limits=limits)


async def wait_for_status(http: httpx.AsyncClient, path: str, status: int, seconds: float = 300.0) -> float:
    """Ask until `path` answers `status`; the time. Raises `TimeoutError`."""
    async with asyncio.timeout(seconds):
        while True:
            try:
                if (await http.get(path)).status_code == status:
                    return time.monotonic()
            except httpx.HTTPError:
                pass  # nobody listens at this moment
            await asyncio.sleep(0.02)
