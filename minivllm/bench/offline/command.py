"""`minivllm bench latency|throughput|startup|fit`: reads the options, measures, prints a table, writes JSON."""

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rich.console import Console

from minivllm.bench.offline.options import (
    BenchOptions,
    FitOptions,
    LatencyOptions,
    StartupOptions,
    ThroughputOptions,
)
from minivllm.bench.output_file import check_output_file, write_json
from minivllm.errors import MiniVLLMError, StartupError
from minivllm.logs import setup_logging
from minivllm.options import load_options


class _Benchmark(NamedTuple):
    options: type[BenchOptions]
    load: Callable[[], Callable[..., Any]]  # seconds of imports: only once the options are known to be good


def main(arguments: Sequence[str], prog: str) -> int:
    """Run the benchmark that `prog` ends with. 0: done; 1: it could not be measured, with one line why."""
    name = prog.rpartition(" ")[2]
    benchmark = BENCHMARKS[name]
    options = load_options(benchmark.options, arguments, prog)
    setup_logging("Bench")
    try:
        _measure(name, benchmark, options)
    except StartupError:
        raise
    except MiniVLLMError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 1
    return 0


def _measure(name: str, benchmark: _Benchmark, options: BenchOptions) -> None:
    check_output_file("json", options.json_)
    measure = benchmark.load()
    from minivllm.bench.offline.shapes import located
    from minivllm.bench.offline.watch import Watch

    with located(options) as (resolved, directory), Watch() as watch:
        report = measure(resolved, directory, watch)
    Console(width=None if sys.stdout.isatty() else 140).print(report.render())
    if options.json_ is not None:
        content = {"benchmark": name, "options": options.model_dump(mode="json", exclude={"json_"}), **report.as_dict()}
        write_json(options.json_, content)


def _load_latency() -> Callable[..., Any]:
    from minivllm.bench.offline.latency import measure_latency

    return measure_latency


def _load_throughput() -> Callable[..., Any]:
    from minivllm.bench.offline.throughput import measure_throughput

    return measure_throughput


def _load_startup() -> Callable[..., Any]:
    from minivllm.bench.offline.startup import measure_startup

    return measure_startup


def _load_fit() -> Callable[..., Any]:
    from minivllm.bench.offline.fit import measure_fit

    return measure_fit


BENCHMARKS = {
    "latency": _Benchmark(LatencyOptions, _load_latency),
    "throughput": _Benchmark(ThroughputOptions, _load_throughput),
    "startup": _Benchmark(StartupOptions, _load_startup),
    "fit": _Benchmark(FitOptions, _load_fit),
}
