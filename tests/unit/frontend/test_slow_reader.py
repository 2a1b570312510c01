"""Two openai clients: one leaves its stream unread, the other reads 100 of them, which is held up by nothing."""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import openai
import pytest

from tests.support.fake_engine import FakeEngine
from tests.unit.frontend.running import RunningFrontend

NUM_FAST, FAST_TOKENS, SLOW_TOKENS = 100, 100, 2000
ASKED = {"model": "test-model", "prompt": [70, 71, 72], "temperature": 0, "stream": True}
SMALL_BUFFER = 16384  # bytes that the system keeps for the frontend's side of a connection


@pytest.fixture
def engine(socket_dir: Path) -> Iterator[FakeEngine]:
    """One whose context holds more than the buffers of a connection."""
    with FakeEngine(socket_dir, max_model_len=4096) as engine:
        engine.tokens_per_step = 4
        yield engine


@asynccontextmanager
async def client_of(frontend: RunningFrontend) -> AsyncIterator[openai.AsyncOpenAI]:
    base_url = f"{frontend.http.base_url}/v1"
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", timeout=60, max_retries=0) as client:
        yield client


async def read_fast(client: openai.AsyncOpenAI) -> int:
    """How many tokens one stream brought, by the log-probabilities beside its text."""
    stream = await client.completions.create(**ASKED, max_tokens=FAST_TOKENS, logprobs=0)  # type: ignore[call-overload]
    return sum([len(chunk.choices[0].logprobs.tokens) async for chunk in stream])


def test_one_slow_reader_among_100_fast_ones(engine: FakeEngine, frontend: RunningFrontend) -> None:
    frontend._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL_BUFFER)

    async def run() -> list[int]:
        async with (
            client_of(frontend) as slow_client,
            client_of(frontend) as fast_client,
        ):
            slow = await slow_client.completions.create(**ASKED, max_tokens=SLOW_TOKENS, logprobs=20)  # type: ignore[call-overload]
            chunks = aiter(slow)
            sizes = [len((await anext(chunks)).choices[0].logprobs.tokens)]
            counts = await asyncio.gather(*(read_fast(fast_client) for _ in range(NUM_FAST)))
            assert counts == [FAST_TOKENS] * NUM_FAST  # all of them, while the slow one stands still
            await asyncio.to_thread(engine.wait_for, lambda: not engine._requests)
            sizes += [len(chunk.choices[0].logprobs.tokens) async for chunk in chunks]
            return sizes

    sizes = asyncio.run(run())
    assert sum(sizes) == SLOW_TOKENS
    assert max(sizes) > SLOW_TOKENS // 8  # merged: the frontend did not write what could not be taken
    assert frontend.is_idle()
