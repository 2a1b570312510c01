"""`scripts/bench_gpu`: parity, then every number that is a goal on a GPU, each part in a process of its own.

A part that fails or takes too long is reported, and the next one runs. Into --out go, for each part, NAME.txt (what it
printed), NAME.log (stderr) and NAME.json, and summary.txt and summary.json for all of them.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from minivllm.bench.offline.report import number

ROOT = Path(__file__).parents[3]
_HTTP = "minivllm.bench.gpu_http"
_TESTS = ("tests/gpu", "tests/unit/engine_core/test_triton_kernels.py")
_PYTEST = (
    *("pytest", "-q", "-p", "no:cacheprovider"),
    *("-o", "addopts=--import-mode=importlib", "-o", "filterwarnings=default"),  # no plugin of ours is needed
)
_SMOKE = (
    *("--num-hidden-layers", "2", "--vocab-size", "2000"),
    *("--max-model-len", "512", "--num-gpu-blocks-override", "128"),
)
_SMOKE_LATENCY = ("--output-lens", "4,24", "--prompt-len", "8", "--ttft-prompt-lens", "16", "--prefill-shape", "2,32")
_SMOKE_THROUGHPUT = ("--num-requests", "4", "--input-lens", "4,16", "--output-lens", "4,16")


@dataclass(frozen=True, slots=True)
class Part:
    """`python -m command…`, killed after `seconds`."""

    name: str
    command: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Goal:
    """A number to reach: at most for times, at least for rates and shares. Peers measured on one H200, same work."""

    part: str
    measurement: str
    goal: float
    vllm: float | None = None
    nano: float | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a part ended, and what it measured: name → (value, unit)."""

    part: str
    problem: str | None
    seconds: float
    measured: dict[str, tuple[float, str]]


GOALS = (
    Goal("throughput-0.6b", "nano bench", 28_000, 18_930, 20_119),
    Goal("latency-0.6b", "decode step, batch 1", 1.3, 1.684, 2.135),
    Goal("latency-0.6b", "decode step, batch 8", 1.4, 2.554, 2.260),
    Goal("latency-0.6b", "decode step, batch 64", 2.3, 4.255, 3.176),
    Goal("latency-0.6b", "prefill 128 × 1,024", 450_000, 376_275),
    Goal("latency-0.6b", "first token, prompt of 1,024", 10, 22.7),
    Goal("throughput-8b", "nano bench", 9_900, 9_442),
    Goal("latency-8b", "decode step, batch 1", 4.4, 4.915),
    Goal("latency-8b", "decode step, batch 64", 5.5, 5.996),
    Goal("startup-0.6b", "start to ready, cold caches", 25, 77),
    Goal("startup-0.6b", "start to ready, warm caches", 12),
    Goal("throughput-0.6b", "GPU busy", 97),
    Goal("http-0.6b", "nano workload, 256 at once", 28_000, 22_750),
    Goal("http-0.6b", "nano workload, 256 at once: TTFT p50", 200, 310),
    Goal("http-0.6b", "nano workload, 256 at once: TTFT p99", 400, 545),
    Goal("http-0.6b", "512 × 128/128 at once", 35_000, 17_750),
    Goal("http-0.6b", "512 × 128/128 at once: ITL p50", 12, 23),
    Goal("http-0.6b", "256 × 128/256, 64 in flight", 24_000, 17_815),
    Goal("http-0.6b", "one stream of 128/256", 720, 555),
    Goal("http-0.6b", "one stream of 128/256: TTFT p50", 8, 12.2),
)


def main(argv: Sequence[str] | None = None) -> int:
    """0: every part ran, whatever it measured. 1: one did not. 2: bad arguments, or no GPU."""
    options = _parse(argv)
    import torch

    if not options.smoke and not torch.cuda.is_available():
        print("bench_gpu: error: torch sees no GPU (--smoke tries it out on a CPU)", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    out = options.out.resolve()
    console = Console(width=None if sys.stdout.isatty() else 140)
    deadline = time.monotonic() + options.time_limit
    parts = smoke_parts() if options.smoke else full_parts()
    outcomes = []
    for part in parts:
        if options.parts and part.name not in options.parts:
            continue
        console.rule(part.name)
        outcomes.append(run_part(part, out, deadline))
        _show(outcomes[-1], out, console)
    table = summary_table(outcomes, () if options.smoke else GOALS)
    console.print(table)
    with (out / "summary.txt").open("w", encoding="utf-8") as file:
        Console(file=file, width=140).print(table)
    content = {"outcomes": [asdict(outcome) for outcome in outcomes], "goals": [asdict(goal) for goal in GOALS]}
    (out / "summary.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return int(any(outcome.problem for outcome in outcomes))


def full_parts() -> list[Part]:
    """Both shapes as the peers were measured: context of 4,096."""
    small = ("--shape", "qwen3-0.6b", "--max-model-len", "4096")
    large = ("--shape", "llama-3.1-8b", "--max-model-len", "4096")
    compared = ("--warmups", "0", "--repeats", "1", "--compare", "hf", "--compare-max-tokens", "64")
    return [
        Part("parity", (*_PYTEST, *_TESTS), 240),
        _bench("startup-0.6b", "startup", *small, seconds=150),
        _bench("latency-0.6b", "latency", *small, seconds=90),
        _bench("throughput-0.6b", "throughput", *small, "--profile", seconds=100),
        _bench("latency-8b", "latency", *large, "--batch-sizes", "1,64", "--repeats", "2", seconds=120),
        _bench("throughput-8b", "throughput", *large, "--repeats", "1", seconds=120),
        Part("http-0.6b", (_HTTP,), 240),
        _bench("compare-0.6b", "throughput", *small, *compared, seconds=150),
    ]


def smoke_parts() -> list[Part]:
    """The same parts on models of two layers and a few tokens: shows that the suite works, not how fast anything is."""
    small, compare = ("--shape", "qwen3-0.6b", *_SMOKE), ("--compare", "hf")
    return [
        Part("parity", (*_PYTEST, _TESTS[0]), 150),
        _bench("startup-0.6b", "startup", *small, seconds=150),
        _bench("latency-0.6b", "latency", *small, *_SMOKE_LATENCY, "--repeats", "1", seconds=150),
        _bench("throughput-0.6b", "throughput", *small, *_SMOKE_THROUGHPUT, *compare, "--repeats", "1", seconds=150),
        Part("http-0.6b", (_HTTP, "--smoke"), 150),
    ]


def run_part(part: Part, out: Path, deadline: float) -> Outcome:
    """Run `part` until it ends or its time is over; never raises for what it does."""
    start = time.monotonic()
    limit = min(part.seconds, deadline - start)
    if limit <= 0:
        return Outcome(part.name, "skipped: no time left (--time-limit)", 0.0, {})
    json_file = out / f"{part.name}.json"
    json_file.unlink(missing_ok=True)
    json_option = ("--json", str(json_file)) if part.command[0] in ("minivllm", _HTTP) else ()
    command = [sys.executable, "-m", *part.command, *json_option]
    with (out / f"{part.name}.txt").open("wb") as text, (out / f"{part.name}.log").open("wb") as log:
        problem = _run(command, limit, text.fileno(), log.fileno())
    measured = _read_measured(json_file) if problem is None and json_option else {}
    return Outcome(part.name, problem, time.monotonic() - start, measured)


def summary_table(outcomes: Sequence[Outcome], goals: Sequence[Goal]) -> Table:
    """How every part ended, and every goal beside what was measured. Peers and goals are of one H200."""
    table = Table("part", "measurement")
    for column in ("vLLM 0.20.2", "nano-vllm", "goal", "measured", "unit"):
        table.add_column(column, justify="right")
    table.add_column("")
    by_part = {outcome.part: outcome for outcome in outcomes}
    for outcome in outcomes:
        table.add_row(outcome.part, outcome.problem or "", *[""] * 5, "FAILED" if outcome.problem else "passed")
    for goal in goals:
        outcome_of = by_part.get(goal.part)
        found = outcome_of.measured.get(goal.measurement) if outcome_of else None
        value, unit = found or (None, "")
        verdict = "" if value is None else "reached" if is_reached(goal, value, unit) else "missed"
        sign = "≤" if unit in ("ms", "s") else "≥" if unit else ""
        peers = number(goal.vllm), number(goal.nano)
        table.add_row(goal.part, goal.measurement, *peers, f"{sign} {number(goal.goal)}", number(value), unit, verdict)
    return table


def is_reached(goal: Goal, value: float, unit: str) -> bool:
    """Times are to be short, everything else is to be large."""
    return value <= goal.goal if unit in ("ms", "s") else value >= goal.goal


def _bench(name: str, *command: str, seconds: float) -> Part:
    return Part(name, ("minivllm", "bench", *command), seconds)


def _run(command: list[str], limit: float, stdout: int, stderr: int) -> str | None:
    """What went wrong, if anything. Its whole process group ends with it, the processes that it started too."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, start_new_session=True
    )
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        return f"killed after {limit:.0f} s"
    finally:
        _kill_group(process)
    return f"exit code {code}" if code else None


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):  # all of them have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read_measured(json_file: Path) -> dict[str, tuple[float, str]]:
    content: dict[str, Any] = json.loads(json_file.read_text(encoding="utf-8"))
    return {row["name"]: (row["value"], row["unit"]) for row in content["measurements"]}


def _show(outcome: Outcome, out: Path, console: Console) -> None:
    text = (out / f"{outcome.part}.txt").read_text(encoding="utf-8", errors="replace")
    console.print(text, markup=False, highlight=False, end="")
    if outcome.problem:
        log = (out / f"{outcome.part}.log").read_text(encoding="utf-8", errors="replace").splitlines()
        console.print("\n".join(log[-20:]), markup=False, highlight=False)
        console.print(f"{outcome.part} FAILED: {outcome.problem}", style="red", markup=False)
    console.print(f"{outcome.part}: {outcome.seconds:.0f} s", highlight=False)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    names = [part.name for part in full_parts()]
    parser = argparse.ArgumentParser(
        prog="scripts/bench_gpu", description="Checks parity and measures every goal on a GPU."
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where text and JSON go")
    parser.add_argument("--parts", nargs="+", choices=names, help="run only these")
    parser.add_argument(
        "--time-limit", type=float, default=600, metavar="S", help="seconds for all parts [%(default)s]"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny models and a few tokens, on any device")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
