"""`minivllm bench latency|throughput|startup`: reads the options, measures, prints a table, writes JSON."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from minivllm.bench.offline.options import (
    BenchOptions,
    FitOptions,
    LatencyOptions,
    StartupOptions,
    ThroughputOptions,
)
from minivllm.errors import MiniVLLMError, StartupError
from minivllm.logs import setup_logging
from minivllm.options import load_options


class _Benchmark(NamedTuple):
    options: type[BenchOptions]
    summary: str
    load: Callable[[], Callable[..., Any]]  # seconds of imports: only once the options are known to be good


def main(arguments: Sequence[str], prog: str) -> int:
    """Run one benchmark. 0: done; 1: it could not be measured, with one line why; 2: bad arguments."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help(prog), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    benchmark = BENCHMARKS.get(arguments[0])
    if benchmark is None:
        print(f"{prog}: error: unknown benchmark {arguments[0]!r} (see {prog} --help)", file=sys.stderr)
        return 2
    options = load_options(benchmark.options, arguments[1:], f"{prog} {arguments[0]}")
    setup_logging("Bench")
    try:
        _measure(arguments[0], benchmark, options)
    except StartupError:
        raise
    except MiniVLLMError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 1
    return 0


def _measure(name: str, benchmark: _Benchmark, options: BenchOptions) -> None:
    if options.json_ is not None and not options.json_.absolute().parent.is_dir():
        raise StartupError(f"--json {options.json_}: no such directory")
    measure = benchmark.load()
    from minivllm.bench.offline.shapes import located
    from minivllm.bench.offline.watch import Watch

    with located(options) as (resolved, directory), Watch() as watch:
        report = measure(resolved, directory, watch)
    Console(width=None if sys.stdout.isatty() else 140).print(report.render())
    if options.json_ is not None:
        content = {"benchmark": name, "options": options.model_dump(mode="json", exclude={"json_"}), **report.as_dict()}
        _write(options.json_, content)


def _write(path: Path, content: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise StartupError(f"--json {path}: {error.strerror}") from error


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
    "latency": _Benchmark(LatencyOptions, "decode step, time to first token, prefill", _load_latency),
    "throughput": _Benchmark(ThroughputOptions, "tokens/s of many requests at once", _load_throughput),
    "startup": _Benchmark(StartupOptions, "start to ready, cold and warm caches", _load_startup),
    "fit": _Benchmark(FitOptions, "single passes, as the cost model of `minivllm simulate`", _load_fit),
}


def _help(prog: str) -> str:
    lines = [f"usage: {prog} BENCHMARK [MODEL] [options]", "", "benchmarks of the engine core, in this process:"]
    lines += [f"  {name:<12} {benchmark.summary}" for name, benchmark in BENCHMARKS.items()]
    return "\n".join([*lines, "", f"{prog} BENCHMARK --help shows its options; scripts/bench measures over HTTP."])
