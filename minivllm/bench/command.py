"""`minivllm bench`: one table of benchmarks, each reading its own options."""

import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple


class _Benchmark(NamedTuple):
    run: Callable[[Sequence[str], str], int]  # its arguments, the name to show in its help → the exit code
    summary: str


def main(arguments: Sequence[str], prog: str) -> int:
    """Run one benchmark. 0: done; 1: it could not be measured, with one line why; 2: bad arguments."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help(prog), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    benchmark = BENCHMARKS.get(arguments[0])
    if benchmark is None:
        print(f"{prog}: error: unknown benchmark {arguments[0]!r} (see {prog} --help)", file=sys.stderr)
        return 2
    return benchmark.run(arguments[1:], f"{prog} {arguments[0]}")


def _serve(arguments: Sequence[str], prog: str) -> int:
    from minivllm.bench.serving.command import main

    return main(arguments, prog)


def _frontend(arguments: Sequence[str], prog: str) -> int:
    from minivllm.bench.frontend.command import main

    return main(arguments, prog)


def _offline(arguments: Sequence[str], prog: str) -> int:
    from minivllm.bench.offline.command import main

    return main(arguments, prog)


BENCHMARKS = {
    "serve": _Benchmark(_serve, "any OpenAI-style server under load: latencies, tokens/s, goodput, sweeps"),
    "frontend": _Benchmark(_frontend, "frontends alone, on a stub engine: tokens/s, and what a token costs"),
    "latency": _Benchmark(_offline, "engine in this process: decode step, time to first token, prefill"),
    "throughput": _Benchmark(_offline, "engine in this process: tokens/s of many requests at once"),
    "startup": _Benchmark(_offline, "start to ready, cold and warm caches"),
    "fit": _Benchmark(_offline, "single passes of the engine, as the cost model of `minivllm simulate`"),
}


def _help(prog: str) -> str:
    lines = [f"usage: {prog} BENCHMARK [options]", "", "benchmarks:"]
    lines += [f"  {name:<12} {benchmark.summary}" for name, benchmark in BENCHMARKS.items()]
    return "\n".join([*lines, "", f"{prog} BENCHMARK --help shows its options."])
