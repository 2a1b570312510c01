"""`python -m minivllm.bench.gpu_http --json FILE`: a whole server on a GPU under the loads that vLLM was measured with.

Random weights in the shape of Qwen3-0.6B with 49,152 vocabulary entries, greedy, no prefix cache, eight load processes.
The server's log goes to stderr. A part of `scripts/bench_gpu`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minivllm.bench.median import median_run
from minivllm.bench.offline.options import BenchOptions
from minivllm.bench.offline.shapes import located
from minivllm.bench.offline.stand_in_tokenizer import write_stand_in_tokenizer
from minivllm.errors import MiniVLLMError
from minivllm.local_server import LocalServer

VOCAB_SIZE = 49_152
SERVER_OPTIONS = ("--load-format", "dummy", "--max-num-seqs", "512", "--no-enable-prefix-caching")
_RUN_SECONDS = 120.0


class Load(NamedTuple):
    """One load: how it is called in the table, and options of `minivllm bench serve`."""

    name: str
    options: tuple[str, ...]


LOADS = (
    Load("nano workload, 256 at once", ("--dataset", "nano", "--max-concurrency", "256")),
    Load("512 × 128/128 at once", ("--num-prompts", "512", "--output-len", "128")),
    Load("256 × 128/256, 64 in flight", ("--output-len", "256", "--max-concurrency", "64")),
    Load("one stream of 128/256", ("--num-prompts", "8", "--output-len", "256", "--max-concurrency", "1")),
)
SMOKE = (Load("smoke", ("--num-prompts", "4", "--input-len", "8", "--output-len", "4")),)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print what `bench serve` prints, and write the medians. 1: the server or a load failed."""
    options = _parse(argv)
    layers = {"num_hidden_layers": 1} if options.smoke else {}
    length = "64" if options.smoke else "4096"
    rows = []
    try:
        shape = BenchOptions(shape="qwen3-0.6b", vocab_size=VOCAB_SIZE, **layers)
        with located(shape) as (_, directory):
            write_stand_in_tokenizer(directory, VOCAB_SIZE)
            server_options = (str(directory), *SERVER_OPTIONS, "--max-model-len", length)
            with LocalServer(*server_options, on_log=lambda line: print(line, file=sys.stderr)) as server:
                for load in SMOKE if options.smoke else LOADS:
                    repeats = 1 if options.smoke else options.repeats
                    rows += measurements(load.name, [_run(server.url, load) for _ in range(repeats)])
    except (MiniVLLMError, subprocess.SubprocessError) as error:
        print(f"gpu_http: error: {error}", file=sys.stderr)
        return 1
    options.json.write_text(json.dumps({"measurements": rows}, indent=1) + "\n", encoding="utf-8")
    return 0


def measurements(name: str, results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the run with the median tokens/s; each result is one of `bench serve --json`."""
    result = median_run(results, lambda result: float(result["output_tokens_per_second"]))
    return [
        {"name": name, "value": result["output_tokens_per_second"], "unit": "tokens/s"},
        {"name": f"{name}: TTFT p50", "value": result["ttft"]["percentiles"]["50"], "unit": "ms"},
        {"name": f"{name}: TTFT p99", "value": result["ttft"]["percentiles"]["99"], "unit": "ms"},
        {"name": f"{name}: ITL p50", "value": result["itl"]["percentiles"]["50"], "unit": "ms"},
    ]


def _run(url: str, load: Load) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = (sys.executable, "-P", "-m", "minivllm", "bench", "serve", "--url", url, "--num-processes", "8")
        print(load.name, flush=True)
        subprocess.run((*command, *load.options, "--json", file.name), check=True, timeout=_RUN_SECONDS)
        result: dict[str, Any] = json.load(file)["results"][0]
        return result


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_http", description="Loads a server on a GPU as vLLM was loaded.")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="where the medians go")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="runs of each load [%(default)s]")
    parser.add_argument("--smoke", action="store_true", help="one layer and one small load, on any device")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
