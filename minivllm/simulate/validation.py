"""`scripts/validate_simulator`: the same traces on the real engine core and in the simulator, side by side.

Both are driven by `run_trace`, from the same seed and with the same options; only device and clock differ. Where they
disagree, the passes of the real run tell whether the cost model is wrong: it says what each of them should have taken.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace

from engine_core.engine import EngineCore
from engine_core.scheduler import Batch
from minivllm.bench.offline.machine import this_machine
from minivllm.bench.offline.passes import launched_batches
from minivllm.config import EngineConfig
from minivllm.errors import StartupError
from minivllm.model_store import resolve_model
from minivllm.progress import Progress
from minivllm.simulate.cost_model import CostModel, load_cost_model
from minivllm.simulate.drive import WallClock, run_trace
from minivllm.simulate.engine import Policy
from minivllm.simulate.metrics import Metrics, measure
from minivllm.simulate.run import simulate
from minivllm.simulate.trace import TraceShape, make_trace

_MIXED = TraceShape(num_requests=24, input_lens=(20, 200), output_lens=(24, 72))
_WARM_UP = replace(_MIXED, arrivals="at-once", output_lens=(2, 16))
TRACES = {
    "24 at once": replace(_MIXED, arrivals="at-once", seed=1),
    "24, Poisson, 1.5 per second": replace(_MIXED, arrivals="poisson", rate=1.5, seed=2),
    "24, bursts of 8, 2 per second": replace(_MIXED, arrivals="burst", rate=2.0, burst_size=8, seed=3),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Print a Markdown table. 0: done; 1: could not run, with one line why."""
    parser = argparse.ArgumentParser(prog="scripts/validate_simulator", description=__doc__)
    parser.add_argument("--cost-model", required=True, metavar="FILE", help="of `minivllm bench fit --json FILE`")
    options = parser.parse_args(argv)
    try:
        print(_validate(options.cost_model))
    except StartupError as error:
        print(f"validate_simulator: error: {error}", file=sys.stderr)
        return 1
    return 0


def _validate(cost_model_path: str) -> str:
    cost_model = load_cost_model(cost_model_path)
    rows, charges = [], []
    with Progress() as progress:
        progress.update("loading the engine")
        config = EngineConfig()
        engine = EngineCore(config, resolve_model(config))
        progress.update("warming up")
        run_trace(engine, make_trace(_WARM_UP), WallClock())
        for name, shape in TRACES.items():
            engine.kv.pool.reset_prefix_cache()
            progress.update(f"{name}: running")
            trace = make_trace(shape)
            before = _seconds_by_kind(engine)
            with launched_batches(engine) as batches:
                real = measure(engine, run_trace(engine, trace, WallClock()))
            engine.check_integrity()
            seconds = {kind: after - before[kind] for kind, after in _seconds_by_kind(engine).items()}
            rows.append(_row(name, real, simulate(cost_model, Policy(), trace).metrics))
            charges.append(_charge(name, cost_model, batches, seconds))
    lines = [
        "| trace | | tokens/s | TTFT mean, ms | TTFT p50 | TTFT p99 | ITL mean | ITL p50 | E2E mean |",
        "|---|---|---|---|---|---|---|---|---|",
        *(line for row in rows for line in row),
        "",
        "| passes of the real run, as the cost model charges them | decode | prefill |",
        "|---|---|---|",
        *charges,
        "",
        f"{config.model}; {this_machine(engine.model.device)}; fit: mean error {100 * cost_model.mean_error:.1f} %",
    ]
    return "\n".join(lines)


def _row(name: str, real: Metrics, simulated: Metrics) -> list[str]:
    pairs = list(zip(_values(real), _values(simulated), strict=True))
    cells = {
        "measured": [f"{real:,.1f}" for real, _ in pairs],
        "simulated": [f"{simulated:,.1f}" for _, simulated in pairs],
        "difference": [f"{100 * (simulated / real - 1):+.1f} %" for real, simulated in pairs],
    }
    return [
        f"| {name if index == 0 else ''} | {what} | {' | '.join(cells[what])} |" for index, what in enumerate(cells)
    ]


def _values(metrics: Metrics) -> list[float]:
    ttft, itl = metrics.ttft, metrics.itl
    return [metrics.tokens_per_second, ttft.mean, ttft.p50, ttft.p99, itl.mean, itl.p50, metrics.e2e.mean]


def _seconds_by_kind(engine: EngineCore) -> dict[str, float]:
    """Of all passes so far."""
    histograms = engine.stats().histograms
    return {kind: histograms[f"step_seconds_{kind}"].sum for kind in ("decode", "prefill")}


def _charge(name: str, cost_model: CostModel, batches: Sequence[Batch], seconds: Mapping[str, float]) -> str:
    cells = []
    for kind, measured in seconds.items():
        charged = sum(cost_model.seconds(batch) for batch in batches if batch.kind == kind)
        cells.append(f"{charged:.1f} s for {measured:.1f} s, {100 * (charged / measured - 1):+.1f} %")
    return f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
