"""Turns measured requests into the numbers that are shown and written."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from minivllm.bench.client import Measured


@dataclass(frozen=True)
class Result:
    """One run of one workload. Rates in tokens per second, latencies in milliseconds."""

    workload: str
    concurrency: int
    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    seconds: float
    tokens_per_second: float
    ttft_p50: float
    ttft_p99: float
    itl_p50: float
    itl_p99: float


def summarize(workload: str, concurrency: int, measured: Sequence[Measured]) -> Result:
    """Numbers of one run, from the first request sent to the last token received."""
    seconds = max(request.tokens[-1][0] for request in measured) - min(request.start for request in measured)
    num_output_tokens = sum(request.num_tokens for request in measured)
    ttft = [1000 * request.time_to_first_token for request in measured]
    itl = [1000 * latency for request in measured for latency in request.inter_token_latencies] or [0.0]
    return Result(
        workload=workload,
        concurrency=concurrency,
        num_requests=len(measured),
        num_prompt_tokens=sum(request.usage["prompt_tokens"] for request in measured),
        num_output_tokens=num_output_tokens,
        num_cached_tokens=sum(request.usage["prompt_tokens_details"]["cached_tokens"] for request in measured),
        seconds=seconds,
        tokens_per_second=num_output_tokens / seconds,
        ttft_p50=percentile(ttft, 0.50),
        ttft_p99=percentile(ttft, 0.99),
        itl_p50=percentile(itl, 0.50),
        itl_p99=percentile(itl, 0.99),
    )


def median_run(runs: Sequence[Result]) -> Result:
    """The run with the median speed (the slower of the middle two)."""
    speed = statistics.median_low(run.tokens_per_second for run in runs)
    return next(run for run in runs if run.tokens_per_second == speed)


def percentile(values: Sequence[float], fraction: float) -> float:
    """The smallest value that at least `fraction` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-fraction * len(ordered) // 1) - 1)]


def make_table(results: Sequence[Result], title: str, caption: str) -> Table:
    """A row for each result."""
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    table.add_column("workload")
    for column in ("in flight", "requests", "tokens in / out", "tokens/s", "TTFT p50 / p99 ms", "ITL p50 / p99 ms"):
        table.add_column(column, justify="right")
    for result in results:
        table.add_row(
            result.workload,
            str(result.concurrency),
            str(result.num_requests),
            f"{result.num_prompt_tokens:,} / {result.num_output_tokens:,}",
            f"[bold]{result.tokens_per_second:.1f}[/]",
            f"{result.ttft_p50:.0f} / {result.ttft_p99:.0f}",
            f"{result.itl_p50:.1f} / {result.itl_p99:.1f}",
        )
    return table
