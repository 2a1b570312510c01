"""A client that measures: it sends a prompt to /generate and notes when each event arrives."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from minivllm.errors import MiniVLLMError


class BenchmarkError(MiniVLLMError):
    """The server did not do what was asked of it; the message says what it answered."""


@dataclass
class Measured:
    """One request. Times in seconds on `time.perf_counter`; `tokens` holds (arrival time, number of tokens)."""

    start: float
    tokens: list[tuple[float, int]] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return sum(count for _, count in self.tokens)

    @property
    def time_to_first_token(self) -> float:
        return self.tokens[0][0] - self.start

    @property
    def inter_token_latencies(self) -> list[float]:
        """Time between events, shared out among the tokens of the later one."""
        pairs = zip(self.tokens, self.tokens[1:], strict=False)
        return [(after - before) / count for (before, _), (after, count) in pairs for _ in range(count)]


async def tokenize(http: httpx.AsyncClient, text: str) -> list[int]:
    """Token ids of `text`, by the server's tokenizer."""
    response = await http.post("/tokenize", json={"prompt": text})
    _check(response.status_code, response.content)
    token_ids: list[int] = response.json()["tokens"]
    return token_ids


async def measure(
    http: httpx.AsyncClient, token_ids: Sequence[int], max_tokens: int, on_tokens: Callable[[int], None]
) -> Measured:
    """Greedy, to the full length. `on_tokens` is told how many have come. Raises `BenchmarkError`."""
    body = {"prompt": list(token_ids), "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    measured = Measured(time.perf_counter())
    async with http.stream("POST", "/generate", json=body) as response:
        if response.status_code != 200:
            _check(response.status_code, await response.aread())
        async for event in events(response.aiter_lines()):
            if "error" in event:
                raise BenchmarkError(event["error"]["message"])
            if event["token_ids"]:
                measured.tokens.append((time.perf_counter(), len(event["token_ids"])))
                on_tokens(len(event["token_ids"]))
            measured.usage = event.get("usage", {})
    if measured.num_tokens != max_tokens:
        raise BenchmarkError(f"a request for {max_tokens} tokens brought {measured.num_tokens}")
    return measured


async def events(lines: AsyncIterator[str]) -> AsyncIterator[dict[str, Any]]:
    """The objects of a server-sent event stream, up to [DONE]."""
    async for line in lines:
        data = line.removeprefix("data: ")
        if data not in {line, "[DONE]"}:
            yield json.loads(data)


async def measure_all(
    http: httpx.AsyncClient,
    requests: Sequence[tuple[Sequence[int], int]],
    concurrency: int,
    on_tokens: Callable[[int], None],
) -> list[Measured]:
    """Every (token ids, max_tokens) in order, `concurrency` in flight: a finished one makes place for the next."""
    places = asyncio.Semaphore(concurrency)

    async def one(token_ids: Sequence[int], max_tokens: int) -> Measured:
        async with places:
            return await measure(http, token_ids, max_tokens, on_tokens)

    return await asyncio.gather(*(one(*request) for request in requests))


def _check(status: int, body: bytes) -> None:
    if status != 200:
        raise BenchmarkError(f"the server answered {status}: {body.decode(errors='replace')[:300]}")
