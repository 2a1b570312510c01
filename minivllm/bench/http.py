"""`scripts/bench`: three workloads over HTTP, on a server of its own or on the one at --url.

A   one request of 64 + 128 tokens                  its first token is the TTFT of a 64-token prompt
B   32 requests (20–200 in, 64–128 out), 8 in flight
C   the same 32 at once

Greedy, to the full length, streamed. No prompt is found in the prefix cache: each gets a first token of its own.
"""

import argparse
import asyncio
import dataclasses
import itertools
import platform
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from minivllm import __version__
from minivllm.bench.frontend_cost import ReadyTime, frontend_rss
from minivllm.bench.median import median_run
from minivllm.bench.output_file import write_json
from minivllm.bench.results import Result, make_result, make_table
from minivllm.bench.serving.endpoints import RequestSpec
from minivllm.bench.serving.generator import LoadError, LoadGenerator
from minivllm.bench.serving.summary import summarize
from minivllm.bench.serving.target import Target
from minivllm.bench.workloads import Prompt, Workload, load_workloads
from minivllm.errors import MiniVLLMError
from minivllm.local_server import LocalServer

_FIRST_TOKEN_ID = 1000  # first tokens count up from here: ordinary words of any vocabulary
_TIMEOUT = 600.0  # seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. 0: done; 1: the server failed, with one line why."""
    options, server_options = _parser().parse_known_args(argv)
    if options.url and server_options:
        _parser().error(f"{' '.join(server_options)}: options of a server make no sense with --url")
    console = Console(stderr=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the server ends with it
    try:
        with ExitStack() as stack:
            ready_time = ReadyTime()
            if options.url is None:
                console.print("Starting a server")
                server = LocalServer(*server_options, on_log=ready_time.on_log)
                options.url = stack.enter_context(server).url
            results, rss = asyncio.run(_run(options.url, options.workloads, options.rounds, console))
    except (MiniVLLMError, httpx.HTTPError) as error:
        print(f"bench: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return 1
    frontend = {"ready_seconds": ready_time.seconds, "rss_bytes": rss}
    table = make_table(results, _title(options.rounds), _caption(results, frontend))
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    if options.json:
        content = {"machine": _machine(), "frontend": frontend, "results": [dataclasses.asdict(r) for r in results]}
        write_json(options.json, content)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Measures TTFT and tokens/s over HTTP.",
        epilog="All other arguments (MODEL, --max-num-seqs …) are those of `minivllm serve`.",
        allow_abbrev=False,
    )
    parser.add_argument("--url", help="measure this server instead of starting one")
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="runs of each workload; shows the median [3]"
    )
    parser.add_argument("--workloads", default="ABC", metavar="ABC", help="which of them [ABC]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    return parser


async def _run(url: str, names: str, rounds: int, console: Console) -> tuple[list[Result], int | None]:
    workloads = [workload for workload in load_workloads() if workload.name in names]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"))
    target = Target(url, "generate", {"temperature": 0, "ignore_eos": True}, timeout=_TIMEOUT)
    async with httpx.AsyncClient(base_url=url, timeout=_TIMEOUT) as http, LoadGenerator(target, 1) as generator:
        with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
            bench = _Bench(http, generator, progress)
            await bench.run_once(load_workloads()[0], "warm-up")
            results = [
                median_run(
                    [await bench.run_once(workload, f"{round_ + 1}") for round_ in range(rounds)],
                    lambda result: result.tokens_per_second,
                )
                for workload in workloads
            ]
        return results, await frontend_rss(http)


class _Bench:
    """Runs workloads, and gives every prompt a first token of its own, so that no two have the same prefix."""

    def __init__(self, http: httpx.AsyncClient, generator: LoadGenerator, progress: Progress) -> None:
        self._http = http
        self._generator = generator
        self._progress = progress
        self._first_ids = itertools.count(_FIRST_TOKEN_ID)

    async def run_once(self, workload: Workload, label: str) -> Result:
        """One run. Raises `LoadError` when a request fails or is short of a token."""
        requests = [await self._request(prompt) for prompt in workload.prompts]
        total = sum(request.max_tokens for request in requests)
        task = self._progress.add_task(f"{workload.name} {label}", total=total)
        samples = await self._generator.run(
            requests,
            [0.0] * len(requests),
            workload.concurrency,
            lambda num_requests, num_tokens: self._progress.update(task, completed=num_tokens),
        )
        self._progress.remove_task(task)
        for request, sample in zip(requests, samples, strict=True):
            if sample.error is not None:
                raise LoadError(sample.error)
            if sample.num_output_tokens != request.max_tokens:
                raise LoadError(f"a request for {request.max_tokens} tokens brought {sample.num_output_tokens}")
        return make_result(workload.name, workload.concurrency, summarize(samples))

    async def _request(self, prompt: Prompt) -> RequestSpec:
        """`prompt` as the server's tokenizer cuts it."""
        response = await self._http.post("/tokenize", json={"prompt": prompt.text})
        if response.status_code != httpx.codes.OK:
            raise LoadError(f"the server answered {response.status_code} to /tokenize: {response.text[:300]}")
        return RequestSpec([next(self._first_ids), *response.json()["tokens"][1:]], prompt.max_tokens)


def _title(rounds: int) -> str:
    return f"Mini-vLLM {__version__} over HTTP, " + ("one run" if rounds == 1 else f"median of {rounds} runs")


def _caption(results: Sequence[Result], frontend: dict[str, Any]) -> str:
    facts = [f"{_machine()}, {datetime.now(UTC):%Y-%m-%d}"]
    if frontend["ready_seconds"] is not None:
        facts.append(f"frontend ready after {frontend['ready_seconds']:.2f} s")
    if frontend["rss_bytes"] is not None:
        facts.append(f"frontend resident memory {frontend['rss_bytes'] / 2**20:.0f} MiB")
    if cached := sum(result.num_cached_tokens for result in results):
        facts.append(f"{cached} prompt tokens came from the prefix cache: restart the server for a fair number")
    return "\n".join(facts)


def _machine() -> str:
    memory = psutil.virtual_memory().total / 2**30
    return f"{psutil.cpu_count()} CPU cores, {memory:.0f} GiB, {platform.system()}, Python {platform.python_version()}"


if __name__ == "__main__":
    sys.exit(main())
