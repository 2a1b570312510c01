"""Measures what watching costs: tokens/s of a server with the live page's event stream open and closed, in turns.

The stream is read by this process, as a browser on another machine would: drawing is the browser's own business.
Before, the engine's own work is measured without a model: what a pass costs the host with and without its record, and
what a view and a block map cost with all blocks in use.
"""

import argparse
import asyncio
import contextlib
import statistics
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import httpx

from engine_core.block_map import draw_block_map
from engine_core.device import Device, ModelFreeTokens, Report, model_free_device
from engine_core.engine import EngineCore
from engine_core.scheduler import Batch
from engine_core.watching import Watching
from minivllm.config import EngineConfig
from minivllm.local_server import LocalServer
from minivllm.protocol import Watch, encode
from minivllm.sampling_params import SamplingParams

NUM_REQUESTS, NUM_TOKENS = 16, 64
EVENTS = "/v1/engine/events"


async def run_once(http: httpx.AsyncClient, salt: int) -> float:
    """Tokens per second of `NUM_REQUESTS` streams at once."""

    async def one(index: int) -> None:
        prompt = [1000 + 50 * salt + index, *range(2000, 2030)]  # no two prompts begin alike
        body = {"prompt": prompt, "max_tokens": NUM_TOKENS, "ignore_eos": True, "temperature": 0}
        async with http.stream("POST", "/generate", json=body) as response:
            response.raise_for_status()
            async for _ in response.aiter_bytes():
                pass

    start = time.perf_counter()
    await asyncio.gather(*(one(index) for index in range(NUM_REQUESTS)))
    return NUM_REQUESTS * NUM_TOKENS / (time.perf_counter() - start)


@contextlib.asynccontextmanager
async def watched(http: httpx.AsyncClient, sizes: list[int]) -> AsyncIterator[None]:
    """The event stream is open inside the block; `sizes` gets the bytes of each piece that came."""
    is_open = asyncio.Event()

    async def read() -> None:
        async with http.stream("GET", EVENTS) as response:
            async for piece in response.aiter_bytes():
                sizes.append(len(piece))
                is_open.set()

    task = asyncio.create_task(read())
    await is_open.wait()
    yield
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def measure(url: str, rounds: int) -> None:
    """Print a line for each round and the medians."""
    closed, opened, sizes = [], [], list[int]()
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None)) as http:
        await run_once(http, 0)
        for number in range(1, rounds + 1):
            for is_watched in (number % 2 == 0, number % 2 == 1):  # first the one, then the other
                salt = 2 * number + is_watched
                if is_watched:
                    async with watched(http, sizes):
                        opened.append(await run_once(http, salt))
                else:
                    closed.append(await run_once(http, salt))
            print(f"round {number}: closed {closed[-1]:6.1f} tokens/s, open {opened[-1]:6.1f}", flush=True)
    ratios = [after / before for before, after in zip(closed, opened, strict=True)]
    print(
        f"median of {rounds}: closed {statistics.median(closed):.1f} tokens/s, open {statistics.median(opened):.1f}; "
        f"open / closed in pairs: median {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}); "
        f"{sum(sizes) / len(opened) / 1000:.0f} kB of events a round; {datetime.now(UTC):%Y-%m-%d}"
    )


class Zeros(ModelFreeTokens):
    """What `NoModel` launched."""

    def __init__(self, num_sampled: int) -> None:
        self._num_sampled = num_sampled

    def collect(self) -> list[int]:
        return [0] * self._num_sampled


class NoModel:
    """A runner whose every token is 0, at once."""

    def launch(self, batch: Batch) -> Zeros:
        return Zeros(len(batch.sampled))

    def release_memory(self) -> None:
        """Nothing to give back."""


def make_engine(num_requests: int, num_blocks: int, num_tokens: int) -> EngineCore:
    """Decoding `num_requests` requests that hold almost all blocks, each with `num_tokens` left to generate."""
    length = 16 * (num_blocks // num_requests) - num_tokens - 16

    def load(config: EngineConfig, directory: Path, report: Report) -> Device:
        sizes = {"num_blocks": num_blocks, "block_size": 16, "max_model_len": length + num_tokens}
        return model_free_device(NoModel(), max_num_batched_tokens=8192, **sizes)

    config = EngineConfig(model="none", max_num_seqs=num_requests, enable_prefix_caching=False)
    engine = EngineCore(config, Path(), load=load)
    for index in range(num_requests):
        engine.add_request(str(index), [index] * length, SamplingParams(max_tokens=num_tokens, ignore_eos=True))
    while engine.scheduler.prefill_queue:
        engine.step()
    return engine


def step_seconds(engine: EngineCore, num_steps: int) -> float:
    """Median time of a pass on the host."""
    times = []
    for _ in range(num_steps):
        start = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure_engine_work(num_requests: int, num_blocks: int) -> None:
    """Print what watching costs the engine's thread at that size."""
    engine = make_engine(num_requests, num_blocks, num_tokens=900)
    pairs = []
    for _ in range(5):
        engine.records.recording = False
        alone = step_seconds(engine, 50)
        engine.records.recording = True
        pairs.append((alone, step_seconds(engine, 50) - alone))
    sizes = list[int]()
    views, maps = [], []
    for _ in range(20):
        step_seconds(engine, 10)
        watching = Watching(1, lambda frontend_id, message: sizes.append(len(encode(message))))
        watching.handle(Watch(bytes(8), at_once=True), engine)
        start = time.perf_counter()
        watching.publish(engine)
        middle = time.perf_counter()
        draw_block_map(engine.kv.pool, engine.held_requests())
        maps.append(time.perf_counter() - middle)
        views.append(middle - start)
    alone, extra = (1e6 * statistics.median(values) for values in zip(*pairs, strict=True))
    view, block_map = 1e3 * statistics.median(views), 1e3 * statistics.median(maps)
    print(f"{num_requests} requests in {num_blocks:,} blocks: a decode pass takes the host {alone:.0f} µs, its record")
    print(f"  {extra:+.1f} µs; a view with a block map {view:.2f} ms, of which the map {block_map:.2f} ms; ", end="")
    print(f"{statistics.median(sizes) / 1e3:.0f} kB", flush=True)


def main() -> None:
    """Parse the command line, start a server, measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="pairs of runs [5]")
    options, server_options = parser.parse_known_args()
    for num_requests, num_blocks in ((16, 1456), (256, 35_000), (256, 100_000)):
        measure_engine_work(num_requests, num_blocks)
    with LocalServer(*server_options) as server:
        asyncio.run(measure(server.url, options.rounds))


if __name__ == "__main__":
    main()
