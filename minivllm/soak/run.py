"""One soak: keep the clients asking, let disasters happen, look for what is left."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from minivllm.soak.disasters import Disaster, Victim
from minivllm.soak.load import Load
from minivllm.soak.report import Report, read_metrics


async def soak(
    load: Load,
    victim: Victim,
    disasters: AsyncIterator[Disaster],
    seed: int,
    on_disaster: Callable[[str, float], None] = lambda name, seconds: None,
) -> Report:
    """Let `disasters` happen one after another, with a random pause before each."""
    report, random_ = Report(), random.Random(seed)
    async with _under(load, report):
        async for disaster in disasters:
            await asyncio.sleep(random_.uniform(0.5, 6.0))  # any moment: prefill, decode, between requests
            seconds = await disaster(victim, load)
            report.recoveries[disaster.__name__].append(seconds)
            on_disaster(disaster.__name__, seconds)
    await _settle(victim, report)
    return report


@asynccontextmanager
async def _under(load: Load, report: Report) -> AsyncIterator[None]:
    """Clients ask inside the block. After it they have finished, and `report` holds what they saw."""
    done, start = asyncio.Event(), time.monotonic()
    clients = asyncio.create_task(load.run(done))
    try:
        await load.next_event()
        yield
    finally:
        done.set()
        await clients
        await load.close()
        report.seconds = time.monotonic() - start
        report.take(load)


async def _settle(victim: Victim, report: Report) -> None:
    """Read the numbers when they say that nothing runs any more, or after a minute."""
    deadline = time.monotonic() + 60
    while True:
        report.metrics = await read_metrics(victim.http)
        report.invariants = (await victim.http.get("/debug/invariants")).json()
        running = report.metrics["vllm:num_requests_running"] + report.metrics["vllm:num_requests_waiting"]
        if (running == 0 and report.num_leaked == 0) or time.monotonic() > deadline:
            break
        await asyncio.sleep(0.2)
    await victim.http.aclose()
