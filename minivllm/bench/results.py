"""Turns the runs of a fixed workload into the numbers that are shown and written."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from minivllm.bench.serving.summary import Summary


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


def make_result(workload: str, concurrency: int, summary: Summary) -> Result:
    """Numbers of one run in which every request succeeded."""
    return Result(
        workload=workload,
        concurrency=concurrency,
        num_requests=summary.num_completed,
        num_prompt_tokens=summary.num_prompt_tokens,
        num_output_tokens=summary.num_output_tokens,
        num_cached_tokens=summary.num_cached_tokens,
        seconds=summary.seconds,
        tokens_per_second=summary.output_tokens_per_second,
        ttft_p50=summary.ttft.percentiles[50],
        ttft_p99=summary.ttft.percentiles[99],
        itl_p50=summary.itl.percentiles[50],
        itl_p99=summary.itl.percentiles[99],
    )


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
