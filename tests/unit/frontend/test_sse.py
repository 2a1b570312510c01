"""An event stream is the same through any ASGI server and through the short cut of ours."""

import asyncio
from collections.abc import AsyncIterator, MutableMapping
from typing import Any

import httpx
import pytest

from frontend import sse
from frontend.http_protocol import WRITE_CHUNK
from tests.unit.frontend.running import RunningFrontend


async def events() -> AsyncIterator[bytes]:
    yield sse.event(b"{}")
    yield sse.DONE


def write(scope: dict[str, Any] | None) -> list[MutableMapping[str, Any]]:
    messages: list[MutableMapping[str, Any]] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        messages.append(message)

    asyncio.run(sse.send_events(send, events(), {"x-a": "b"}, scope))
    return messages


@pytest.mark.parametrize("scope", [None, {"extensions": None}, {"extensions": {}}])
def test_through_any_server(scope: dict[str, Any] | None) -> None:
    start, *bodies, end = write(scope)
    assert (b"x-a", b"b") in start["headers"]
    assert [body["body"] for body in bodies] == [b"data: {}\n\n", sse.DONE]
    assert end == {"type": "http.response.body", "body": b"", "more_body": False}


def test_through_the_short_cut() -> None:
    written: list[bytes] = []

    async def write_chunk(data: bytes) -> None:
        written.append(data)

    assert len(write({"extensions": {WRITE_CHUNK: write_chunk}})) == 2
    assert written == [b"data: {}\n\n", sse.DONE]


def test_streams_follow_each_other_on_one_connection(frontend: RunningFrontend) -> None:
    """Every chunk is framed as HTTP has it, or the second answer could not be read."""
    body = {"prompt": [70, 71], "max_tokens": 50}
    with httpx.Client(base_url=str(frontend.http.base_url), limits=httpx.Limits(max_connections=1)) as client:
        answers = [client.post("/generate", json=body) for _ in range(3)]
    for answer in answers:
        assert answer.headers["transfer-encoding"] == "chunked"
        assert answer.text.endswith("data: [DONE]\n\n")
        assert answer.text.count('"finish_reason":"length"') == 1
