"""The demo's clients: each streams one answer; a later one joins while the others decode."""

import asyncio
import time
from collections.abc import Callable

import httpx

from minivllm.demo.state import Client, DemoState
from minivllm.event_stream import post_events

REDRAW_SECONDS = 0.05


async def run_clients(url: str, state: DemoState, redraw: Callable[[], None]) -> None:
    """Stream every client's answer into `state`, calling `redraw` twenty times a second and at the end."""
    start = time.monotonic()
    async with httpx.AsyncClient(base_url=url, timeout=600) as http:
        progress = asyncio.Condition()
        pending = {asyncio.create_task(_ask(http, client, state, progress)) for client in state.clients}
        while pending:
            done, pending = await asyncio.wait(pending, timeout=REDRAW_SECONDS)
            for task in done:
                task.result()  # a client that failed ends the demo
            state.seconds = time.monotonic() - start
            redraw()


async def _ask(http: httpx.AsyncClient, client: Client, state: DemoState, progress: asyncio.Condition) -> None:
    async with progress:
        await progress.wait_for(lambda: state.clients[0].num_tokens >= client.starts_after)
    client.started = True
    body = {
        "messages": [{"role": "user", "content": client.question}],
        "max_tokens": client.max_tokens,
        "temperature": 0,
        "request_id": client.name,
    }
    async for event in post_events(http, "/generate", body):
        client.text += event["text"]
        client.num_tokens += len(event["token_ids"])
        client.finish_reason = event["finish_reason"]
        async with progress:
            progress.notify_all()
