"""What a measurement found, for a reader and as JSON."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from minivllm.bench.serving.options import Point
from minivllm.bench.serving.summary import PERCENTILES, Distribution, Summary
from minivllm.units import number

_MAX_ERRORS = 5  # different messages that are shown


def render(results: Sequence[tuple[Point, Summary]], title: str) -> Group:
    """A table of one load in full, or of several with a row each; then what went wrong."""
    parts: list[RenderableType] = [Text(title, style="bold")]
    if len(results) == 1:
        parts += [_rates(results[0][1]), _latencies(results[0][1])]
    else:
        parts.append(_sweep(results))
    return Group(*parts, *(Text(note, style="red") for note in _notes([summary for _, summary in results])))


def _rates(summary: Summary) -> Table:
    table = Table(show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    rows = {
        "requests completed / failed": f"{summary.num_completed:,} / {summary.num_failed:,}",
        "duration, s": f"{summary.seconds:.2f}",
        "tokens in / out": f"{summary.num_prompt_tokens:,} / {summary.num_output_tokens:,}",
        "requests/s": f"{summary.requests_per_second:.2f}",
        "output tokens/s": f"[bold]{summary.output_tokens_per_second:,.1f}[/]",
        "all tokens/s": f"{summary.total_tokens_per_second:,.1f}",
        "tokens per event": f"{summary.tokens_per_event:.2f}",
    }
    if summary.num_cached_tokens:
        rows["prompt tokens from the cache"] = f"{summary.num_cached_tokens:,}"
    if summary.goodput is not None:
        rows["goodput, requests/s"] = f"{summary.goodput:.2f}"
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _latencies(summary: Summary) -> Table:
    table = Table("milliseconds")
    for column in ("mean", *(f"p{percent}" for percent in PERCENTILES), "max"):
        table.add_column(column, justify="right")
    for name in ("ttft", "itl", "tpot", "e2e"):
        latency: Distribution = getattr(summary, name)
        values = (latency.mean, *latency.percentiles.values(), latency.max)
        table.add_row(name.upper(), *map(number, values))
    return table


def _sweep(results: Sequence[tuple[Point, Summary]]) -> Table:
    table = Table("load")
    columns = ["failed", "tokens/s", "requests/s", "TTFT p50 / p99", "ITL p50 / p99", "TPOT p50 / p99", "E2E p50 / p99"]
    with_goodput = results[0][1].goodput is not None
    for column in columns + ["goodput"] * with_goodput:
        table.add_column(column, justify="right")
    for point, summary in results:
        table.add_row(
            str(point),
            str(summary.num_failed),
            f"[bold]{summary.output_tokens_per_second:,.1f}[/]",
            f"{summary.requests_per_second:.2f}",
            *(_pair(latency) for latency in (summary.ttft, summary.itl, summary.tpot, summary.e2e)),
            *([f"{summary.goodput:.2f}"] if summary.goodput is not None else []),
        )
    return table


def _notes(summaries: Sequence[Summary]) -> list[str]:
    errors: dict[str, int] = {}
    for summary in summaries:
        for message, count in summary.errors.items():
            errors[message] = errors.get(message, 0) + count
    notes = [f"{count} requests failed: {message}" for message, count in list(errors.items())[:_MAX_ERRORS]]
    if len(errors) > _MAX_ERRORS:
        notes.append(f"… and {len(errors) - _MAX_ERRORS} other errors")
    if not all(summary.has_usage for summary in summaries):
        notes.append("the server sent no usage: every event counts as one token, and prompt tokens are unknown")
    return notes


def _pair(latency: Distribution) -> str:
    return f"{number(latency.percentiles[50])} / {number(latency.percentiles[99])}"
