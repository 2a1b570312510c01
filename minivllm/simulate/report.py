"""Simulations for a reader: tables and a plot over time."""

from pathlib import Path

import numpy as np
from rich.table import Table

from minivllm.plots import COLORS, new_figure, save_figure
from minivllm.simulate.capacity import SLO, Probe
from minivllm.simulate.metrics import Latency, Metrics
from minivllm.simulate.run import Simulation

_MAX_POINTS = 400  # of a line in a plot


def metrics_table(metrics: Metrics, title: str) -> Table:
    """Latencies as rows, then the counts."""
    table = Table(title=title, title_justify="left")
    table.add_column("ms")
    for column in ("mean", "p50", "p90", "p99"):
        table.add_column(column, justify="right")
    for name in ("ttft", "itl", "tpot", "e2e", "queue"):
        latency: Latency = getattr(metrics, name)
        values = (latency.mean, latency.p50, latency.p90, latency.p99)
        table.add_row(name.upper() if name != "queue" else "waiting", *(f"{value:,.1f}" for value in values))
    return table


def summary_lines(simulation: Simulation) -> list[str]:
    """Counts and rates, one fact a line."""
    metrics = simulation.metrics
    work = f"{metrics.num_prompt_tokens:,} tokens in, {metrics.num_output_tokens:,} out"
    rates = f"{metrics.tokens_per_second:,.1f} tokens/s, {metrics.requests_per_second:,.3g} requests/s"
    usage = f"mean {100 * metrics.kv_usage_mean:.1f} %, peak {100 * metrics.kv_usage_peak:.1f} % in use"
    time = f"{metrics.seconds:,.1f} s of virtual time ({simulation.wall_seconds:.1f} s here)"
    return [
        f"{metrics.num_requests:,} requests, {work}, in {time}",
        f"{rates}; {metrics.num_steps:,} steps, {metrics.mean_decode_batch:.1f} requests in a decode step",
        f"KV cache of {simulation.num_blocks:,} blocks: {usage}; prefix hits {100 * metrics.prefix_hit_rate:.1f} %",
        f"{metrics.num_preemptions:,} preemptions; at most {metrics.queue_peak:,} requests in the prefill queue",
    ]


def probes_table(probes: list[Probe], slo: SLO) -> Table:
    """Every rate that was tried, by rate."""
    table = Table(title=f"rates against {slo}", title_justify="left")
    for column in ("requests/s", "tokens/s", "TTFT p50 / p99 ms", "TPOT p50 / p99 ms"):
        table.add_column(column, justify="right")
    table.add_column("kept?")
    for probe in sorted(probes, key=lambda probe: probe.rate):
        metrics = probe.metrics
        table.add_row(
            f"{probe.rate:.3g}",
            f"{metrics.tokens_per_second:,.0f}",
            f"{metrics.ttft.p50:,.0f} / {metrics.ttft.p99:,.0f}",
            f"{metrics.tpot.p50:,.0f} / {metrics.tpot.p99:,.0f}",
            "; ".join(probe.violations) or "yes",
        )
    return table


def plot_simulation(simulation: Simulation, title: str, path: Path) -> None:
    """Requests by state and KV cache usage over virtual time. Raises `StartupError`."""
    observed = simulation.observed
    figure, (top, bottom) = new_figure(2, height=2.6)
    keep = np.unique(np.linspace(0, len(observed.step_times) - 1, _MAX_POINTS).astype(int))
    times = np.asarray(observed.step_times)[keep]
    decoding, prefilling = (np.asarray(values)[keep] for values in (observed.num_decoding, observed.num_prefilling))
    top.plot(times, decoding, color=COLORS[0], label="decode queue", linewidth=1)
    top.plot(times, prefilling, color=COLORS[1], label="prefill queue", linewidth=1)
    top.set(ylabel="requests", title=title)
    top.legend(frameon=False)
    bottom.fill_between(
        times, 100 * np.asarray(observed.used_blocks)[keep] / simulation.num_blocks, color=COLORS[2], alpha=0.6
    )
    bottom.set(ylabel="KV cache in use, %", xlabel="virtual seconds", ylim=(0, 100))
    save_figure(figure, path)
