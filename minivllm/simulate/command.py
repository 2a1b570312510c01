"""`minivllm simulate`: reads the options, simulates one trace or looks for a rate, prints, plots, writes JSON."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console

from minivllm.errors import StartupError
from minivllm.options import load_options
from minivllm.plots import require_matplotlib
from minivllm.simulate.cost_model import CostModel, load_cost_model
from minivllm.simulate.options import SimulateOptions


def main(arguments: Sequence[str], prog: str) -> int:
    """Simulate. 0: done; 2: bad arguments. Raises `StartupError`."""
    options = load_options(SimulateOptions, arguments, prog)
    cost_model = load_cost_model(options.cost_model)
    if options.plot is not None:
        require_matplotlib()
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(f"cost model: {cost_model.description}", style="dim")
    content = _find_rate(options, cost_model, console) if options.slo else _simulate(options, cost_model, console)
    if options.json_ is not None:
        _write_json(options, {"cost_model": cost_model.description, **content})
    return 0


def _simulate(options: SimulateOptions, cost_model: CostModel, console: Console) -> dict[str, Any]:
    from minivllm.simulate.report import metrics_table, plot_simulation, summary_lines
    from minivllm.simulate.run import simulate
    from minivllm.simulate.trace import make_trace, read_trace

    trace = make_trace(options.shape) if options.trace is None else read_trace(options.trace)
    simulation = simulate(cost_model, options.policy, trace)
    title = _title(options)
    console.print(metrics_table(simulation.metrics, title))
    console.print("\n".join(summary_lines(simulation)))
    if options.plot is not None:
        plot_simulation(simulation, title, options.plot)
    return {"metrics": asdict(simulation.metrics), "wall_seconds": simulation.wall_seconds}


def _find_rate(options: SimulateOptions, cost_model: CostModel, console: Console) -> dict[str, Any]:
    from minivllm.simulate.capacity import SLO, find_rate, num_servers
    from minivllm.simulate.metrics import Metrics
    from minivllm.simulate.report import probes_table
    from minivllm.simulate.run import simulate
    from minivllm.simulate.trace import make_trace

    slo = SLO.parse(options.slo, options.percentile)

    def metrics_at(rate: float) -> Metrics:
        return simulate(cost_model, options.policy, make_trace(options.shape.at_rate(rate))).metrics

    probes = find_rate(metrics_at, slo, options.rate)
    best = probes[-1]
    console.print(probes_table(probes, slo))
    console.print(
        f"one server keeps it up to {best.rate:.3g} requests/s ({best.metrics.tokens_per_second:,.0f} tokens/s)"
    )
    content: dict[str, Any] = {"slo": slo.limits, "percentile": slo.percentile, "rate": best.rate}
    if options.traffic is not None:
        content["num_servers"] = num_servers(options.traffic, best.rate)
        console.print(f"{options.traffic:g} requests/s need {content['num_servers']} servers")
    return content | {"probes": [asdict(probe) for probe in probes]}


def _title(options: SimulateOptions) -> str:
    if options.trace is not None:
        return f"trace {options.trace.name}"
    rate = "" if options.arrivals == "at-once" else f" at {options.rate:g} requests/s"
    return f"{options.num_requests:,} requests, {options.arrivals}{rate}"


def _write_json(options: SimulateOptions, content: dict[str, Any]) -> None:
    if options.json_ is None:
        return
    asked = options.model_dump(mode="json", exclude={"json_", "plot"})
    try:
        options.json_.write_text(json.dumps({"options": asked, **content}, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise StartupError(f"--json {options.json_}: {error.strerror}") from error
