"""`minivllm bench serve`: reads the options, makes the load, prints a table, writes JSON and a curve."""

import asyncio
import random
import signal
import sys
from collections.abc import Sequence
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from minivllm.bench.output_file import check_output_file, write_json
from minivllm.bench.serving.arrivals import arrival_offsets
from minivllm.bench.serving.datasets import RandomPrompts
from minivllm.bench.serving.generator import LoadError, LoadGenerator, default_num_processes
from minivllm.bench.serving.options import Point, ServeBenchOptions
from minivllm.bench.serving.plot import draw
from minivllm.bench.serving.report import render
from minivllm.bench.serving.summary import Summary, summarize
from minivllm.bench.serving.target import Target
from minivllm.options import load_options
from minivllm.plots import require_matplotlib

_WARMUP = {"input_len": 32, "output_len": 16}
_LOOKUP_SECONDS = 30.0

Results = list[tuple[Point, Summary]]


def main(arguments: Sequence[str], prog: str) -> int:
    """Measure and print. 0: done; 1: a request failed or nothing could be measured; 2: bad arguments."""
    options = load_options(ServeBenchOptions, arguments, prog)
    check_output_file("json", options.json_)
    check_output_file("plot", options.plot)
    if options.plot is not None:
        require_matplotlib()  # before the measurement, not after it
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the load processes end with it
    console = Console(stderr=True)
    try:
        results = asyncio.run(_measure(options, console))
    except LoadError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 1
    title = f"{options.url} {options.endpoint}, {_dataset(options)}"
    Console(width=None if sys.stdout.isatty() else 140).print(render(results, title))
    if options.json_ is not None:
        write_json(options.json_, _content(options, results))
    if options.plot is not None:
        draw(results, title, options.plot)
    return 1 if any(summary.num_failed for _, summary in results) else 0


async def _measure(options: ServeBenchOptions, console: Console) -> Results:
    target = Target(
        options.url, options.endpoint, await _fields(options), api_key=options.api_key, timeout=options.timeout
    )
    results = []
    num_processes = options.num_processes or default_num_processes()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"))
    progress = Progress(*columns, TimeElapsedColumn(), console=console, transient=True)
    async with LoadGenerator(target, num_processes) as generator:
        await _warm_up(generator, options)
        with progress:
            for index, point in enumerate(options.points):
                results.append((point, await _run(generator, options, index, progress)))
    return results


async def _run(generator: LoadGenerator, options: ServeBenchOptions, index: int, progress: Progress) -> Summary:
    """The load number `index`. Random prompts differ from one load to the next: the prefix cache must not help."""
    point, seed = options.points[index], options.seed + index
    requests = options.requests(seed)
    offsets = arrival_offsets(len(requests), point.rate, options.burstiness, random.Random(seed))
    task = progress.add_task(str(point), total=len(requests), speed="")

    def on_progress(num_requests: int, num_tokens: int) -> None:
        elapsed = progress.tasks[-1].elapsed or 0.0
        speed = f"{num_tokens / elapsed:,.0f} tokens/s" if elapsed else ""
        progress.update(task, completed=num_requests, speed=speed)

    samples = await generator.run(requests, offsets, point.concurrency, on_progress)
    progress.remove_task(task)
    return summarize(samples, options.slo)


async def _warm_up(generator: LoadGenerator, options: ServeBenchOptions) -> None:
    """Small requests of their own, so that nothing of the measured ones is in a cache. Raises `LoadError`."""
    if not options.num_warmups:
        return
    prompts = RandomPrompts(random.Random(f"warm-up {options.seed}"), options.max_token_id, options.endpoint == "chat")
    requests = prompts.requests(options.num_warmups, **_WARMUP)
    samples = await generator.run(requests, [0.0] * len(requests))
    if all(sample.error is not None for sample in samples):
        raise LoadError(f"no request succeeded: {samples[0].error}")


async def _fields(options: ServeBenchOptions) -> dict[str, Any]:
    """What all bodies hold. The name of the model is looked up where the endpoint needs one."""
    if options.endpoint == "generate":
        return options.sampling_fields
    return {"model": options.model or await _first_model(options), **options.sampling_fields}


async def _first_model(options: ServeBenchOptions) -> str:
    url = options.url.rstrip("/").removesuffix("/v1") + "/v1/models"
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else None
    try:
        async with httpx.AsyncClient(timeout=_LOOKUP_SECONDS) as http:
            response = await http.get(url, headers=headers)
            response.raise_for_status()
            return str(response.json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise LoadError(f"{url} lists no model (give its name as MODEL): {error}") from error


def _dataset(options: ServeBenchOptions) -> str:
    if options.dataset_path is not None:
        return options.dataset_path.name
    return "nano-vllm's workload" if options.dataset == "nano" else f"random, {options.input_len} tokens in"


def _content(options: ServeBenchOptions, results: Results) -> dict[str, Any]:
    chosen = options.model_dump(mode="json", exclude={"json_", "plot", "api_key", "request_rate", "max_concurrency"})
    loads = [
        {"request_rate": str(point.rate), "max_concurrency": point.concurrency, **summary.as_dict()}
        for point, summary in results
    ]
    return {"benchmark": "serve", "options": chosen, "results": loads}
