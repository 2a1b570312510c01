"""What a soak counts as a refusal, and what as a failure."""

import asyncio

import httpx
import pytest

from minivllm.soak.answers import NoAnswerError, RefusedError, ask


@pytest.mark.parametrize(("status", "kind"), [(503, RefusedError), (429, RefusedError), (500, NoAnswerError)])
def test_a_refusal_is_told_from_a_failure(status: int, kind: type[NoAnswerError]) -> None:
    async def run() -> None:
        transport = httpx.MockTransport(lambda request: httpx.Response(status, json={"error": {"message": "why"}}))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
            await ask(http, {"prompt": "x"}, lambda now: None)

    with pytest.raises(NoAnswerError, match=f"answered {status}: why") as raised:
        asyncio.run(run())
    assert type(raised.value) is kind
