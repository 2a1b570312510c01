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
import json
import platform
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from minivllm import __version__
from minivllm.bench.client import measure_all, tokenize
from minivllm.bench.frontend_cost import ReadyTime, frontend_rss
from minivllm.bench.results import Result, make_table, median_run, summarize
from minivllm.bench.workloads import Workload, load_workloads
from minivllm.errors import MiniVLLMError
from minivllm.local_server import LocalServer

_FIRST_TOKEN_ID = 1000  # first tokens count up from here: ordinary words of any vocabulary
_TIMEOUT = httpx.Timeout(600.0)


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
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
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
    async with httpx.AsyncClient(base_url=url, timeout=_TIMEOUT, limits=httpx.Limits(max_connections=None)) as http:
        with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
            first_ids = itertools.count(_FIRST_TOKEN_ID)
            await _run_once(http, load_workloads()[0], first_ids, "warm-up", progress)
            results = [
                median_run(
                    [await _run_once(http, workload, first_ids, f"{round_ + 1}", progress) for round_ in range(rounds)]
                )
                for workload in workloads
            ]
        return results, await frontend_rss(http)


async def _run_once(
    http: httpx.AsyncClient, workload: Workload, first_ids: Iterator[int], label: str, progress: Progress
) -> Result:
    """One run; every prompt gets a first token of its own, so that no other has the same prefix."""
    requests = [
        ([next(first_ids), *(await tokenize(http, prompt.text))[1:]], prompt.max_tokens) for prompt in workload.prompts
    ]
    total = sum(max_tokens for _, max_tokens in requests)
    task = progress.add_task(f"{workload.name} {label}", total=total)
    measured = await measure_all(http, requests, workload.concurrency, lambda count: progress.advance(task, count))
    progress.remove_task(task)
    return summarize(workload.name, workload.concurrency, measured)


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
