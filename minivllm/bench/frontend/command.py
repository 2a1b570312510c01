"""`minivllm bench frontend`: tokens/s from a stub engine through real frontends to a client, and what a token costs."""

import asyncio
import resource
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from rich.console import Console
from rich.table import Table

from minivllm.bench.frontend.options import FrontendBenchOptions
from minivllm.bench.frontend.processes import MODEL_NAME, Processes, running
from minivllm.bench.output_file import check_output_file, write_json
from minivllm.bench.serving.endpoints import Prompt, RequestSpec
from minivllm.bench.serving.generator import LoadError, LoadGenerator
from minivllm.bench.serving.messages import Sample
from minivllm.bench.serving.target import Target
from minivllm.options import load_options

_PROMPT = [100, 200, 300]  # tokens; how prompts come in is not what is measured


@dataclass(frozen=True)
class Delivery:
    """One measurement, between the first and the last event at the client; processor time includes the requests' start.

    tokens_per_event: 1.0 when every step reached the client as an event of its own; more when the writer was behind.
    frontend_us, engine_us, load_us: processor time per token in microseconds, of all frontends together, of the stub
    and of all load processes together.
    """

    tokens_per_second: float
    tokens_per_event: float
    frontend_us: float
    engine_us: float
    load_us: float
    itl_p50_ms: float
    itl_p99_ms: float


def main(arguments: Sequence[str], prog: str) -> int:
    """Measure and print. 0: done; 1: it could not be measured, with one line why; 2: bad arguments."""
    options = load_options(FrontendBenchOptions, arguments, prog)
    check_output_file("json", options.json_)
    try:
        deliveries = _measure(options)
    except LoadError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 1
    Console(width=None if sys.stdout.isatty() else 140).print(_table(options, deliveries))
    if options.json_ is not None:
        chosen = options.model_dump(mode="json", exclude={"json_"})
        write_json(
            options.json_, {"benchmark": "frontend", "options": chosen, "results": list(map(asdict, deliveries))}
        )
    return 0


def _measure(options: FrontendBenchOptions) -> list[Delivery]:
    from frontend.tokenizer import Tokenizer  # only its size: the stub must not invent ids that no text stands for
    from minivllm.model_store import resolve_tokenizer

    directory = resolve_tokenizer(options)
    vocab_size = Tokenizer.from_directory(directory).vocab_size
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    with running(options, str(directory), vocab_size) as processes:
        return asyncio.run(_run(options, processes))


async def _run(options: FrontendBenchOptions, processes: Processes) -> list[Delivery]:
    fields: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
    if options.endpoint != "generate":
        fields["model"] = MODEL_NAME
    target = Target(processes.url, options.endpoint, fields)
    prompt: Prompt = "Hello" if options.endpoint == "chat" else _PROMPT
    requests = [RequestSpec(prompt, options.output_len)] * options.streams
    deliveries = []
    async with LoadGenerator(target, options.num_processes) as generator:
        for _ in range(options.repeats + 1):  # the first one warms up
            before = (*processes.cpu_seconds(), generator.cpu_seconds())
            samples = await generator.run(requests, [0.0] * len(requests))
            after = (*processes.cpu_seconds(), generator.cpu_seconds())
            deliveries.append(_delivery(samples, *(end - start for start, end in zip(before, after, strict=True))))
    return deliveries[1:]


def _delivery(
    samples: Sequence[Sample], frontend_seconds: float, engine_seconds: float, load_seconds: float
) -> Delivery:
    for sample in samples:
        if sample.error is not None:
            raise LoadError(f"a request failed: {sample.error}")
    num_tokens = sum(sample.num_output_tokens for sample in samples)
    seconds = max(sample.event_times[-1] for sample in samples) - min(sample.event_times[0] for sample in samples)
    gaps = sorted(b - a for sample in samples for a, b in pairwise(sample.event_times))
    return Delivery(
        tokens_per_second=num_tokens / seconds,
        tokens_per_event=num_tokens / sum(len(sample.event_times) for sample in samples),
        frontend_us=1e6 * frontend_seconds / num_tokens,
        engine_us=1e6 * engine_seconds / num_tokens,
        load_us=1e6 * load_seconds / num_tokens,
        itl_p50_ms=1000 * gaps[len(gaps) // 2],
        itl_p99_ms=1000 * gaps[len(gaps) * 99 // 100],
    )


def _table(options: FrontendBenchOptions, deliveries: Sequence[Delivery]) -> Table:
    title = (
        f"{options.frontends} frontend(s), {options.endpoint}, {options.streams} streams of {options.output_len} "
        f"tokens, {options.tokens_per_second:,.0f} tokens/s offered"
    )
    table = Table(title=title, title_justify="left")
    columns = {
        "delivered tokens/s": ("tokens_per_second", ",.0f"),
        "tokens per event": ("tokens_per_event", ".2f"),
        "frontend µs/token": ("frontend_us", ".1f"),
        "stub engine µs/token": ("engine_us", ".1f"),
        "load µs/token": ("load_us", ".1f"),
        "ITL p50 ms": ("itl_p50_ms", ".1f"),
        "ITL p99 ms": ("itl_p99_ms", ".1f"),
    }
    for name in ("run", *columns):
        table.add_column(name, justify="right")
    for index, delivery in enumerate(deliveries):
        row = [format(getattr(delivery, name), spec) for name, spec in columns.values()]
        table.add_row(str(index + 1), *row)
    medians = [
        format(statistics.median(getattr(each, name) for each in deliveries), spec) for name, spec in columns.values()
    ]
    table.add_section()
    table.add_row("median", *medians, style="bold")
    return table
