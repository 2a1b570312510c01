"""Lab latency-throughput: tokens/s, TTFT and ITL against batch size and arrival rate, and where the knee is."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from engine_core.engine import EngineCore
from engine_core.scheduler import Scheduler
from minivllm.labs.findings import Findings, Rows
from minivllm.labs.workbench import Workbench
from minivllm.plots import COLORS, new_figure
from minivllm.simulate.metrics import Metrics
from minivllm.simulate.trace import TraceShape, make_trace
from minivllm.units import duration, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PROMPT_LEN = 16


class Load(NamedTuple):
    """A batch size or an arrival rate, and what came of it."""

    size: float
    metrics: Metrics


def run(bench: Workbench) -> Findings:
    """Batches first: they say what the machine can do, and so which arrival rates are interesting."""
    sizes = bench.pick([1, 2, 4, 8, 16, 32, 64], [1, 4], gpu=[1, 4, 16, 32, 64, 128, 256])
    num_requests, output_len = bench.pick((20, 16), (4, 4), gpu=(256, 32))
    fractions = bench.pick([0.25, 0.5, 1.0, 2.0], [0.5, 2.0])
    bench.watch.plan(len(sizes) + len(fractions) + 1)
    engine = bench.engine(enable_prefix_caching=False)
    bench.observe(engine, bench.at_once([2] * sizes[-1], _PROMPT_LEN))  # warms up
    batches = []
    for size in sizes:
        trace = bench.at_once([output_len] * size, _PROMPT_LEN)
        batches.append(Load(size, bench.watch.run(f"{size} at once", partial(bench.observe, engine, trace))))
    capacity = max(load.metrics.requests_per_second for load in batches)
    lens = (output_len, output_len)
    shape = TraceShape("poisson", num_requests, input_lens=(_PROMPT_LEN, _PROMPT_LEN), output_lens=lens)
    rates = []
    for fraction in fractions:
        trace = make_trace(shape.at_rate(fraction * capacity))
        text = f"{number(fraction * capacity)} requests/s"
        rates.append(Load(fraction * capacity, bench.watch.run(text, partial(bench.observe, engine, trace))))
    alone = bench.engine(max_num_seqs=1, enable_prefix_caching=False)
    middle = rates[len(rates) // 2]
    broken = bench.watch.run("no batching", partial(bench.observe, alone, make_trace(shape.at_rate(middle.size))))
    best = knee(batches)
    single = batches[0].metrics
    return Findings(
        number=f"The knee is at a batch of {best.size:.0f}: {number(best.metrics.tokens_per_second)} tokens/s at "
        f"{duration(best.metrics.itl.p50 / 1000)} between tokens; one request alone gets "
        f"{number(single.tokens_per_second)} tokens/s at {duration(single.itl.p50 / 1000)}.",
        broken=f"at {number(middle.size)} requests/s without batching the median TTFT is "
        f"{duration(broken.ttft.p50 / 1000)} instead of {duration(middle.metrics.ttft.p50 / 1000)}.",
        tables=[
            _table("Batches: all at once", "requests", [f"{size:,}" for size in sizes], batches),
            _table("Arrivals: Poisson", "requests/s", [number(load.size) for load in rates], rates),
        ],
        figure=_draw(batches, rates, best),
        code=(Scheduler.schedule, EngineCore.step),
        notes=[f"Prompts of {_PROMPT_LEN} tokens, {output_len} output tokens. The knee has the most tokens/s per ITL."],
    )


def knee(loads: Sequence[Load]) -> Load:
    """Kleinrock's power: the load with the most throughput for its latency."""
    return max(loads, key=lambda load: load.metrics.tokens_per_second / max(load.metrics.itl.p50, 1e-9))


def _table(title: str, unit: str, names: Sequence[str], loads: Sequence[Load]) -> Rows:
    rows = [
        (
            name,
            number(load.metrics.tokens_per_second),
            f"{number(load.metrics.ttft.p50)} / {number(load.metrics.ttft.p99)}",
            f"{number(load.metrics.itl.p50)} / {number(load.metrics.itl.p99)}",
        )
        for name, load in zip(names, loads, strict=True)
    ]
    return Rows(title, (unit, "tokens/s", "TTFT p50 / p99, ms", "ITL p50 / p99, ms"), rows)


def _draw(batches: Sequence[Load], rates: Sequence[Load], best: Load) -> "Figure":
    figure, (top, bottom) = new_figure(2)
    _draw_loads(top, batches, "ITL p50, ms", [load.metrics.itl.p50 for load in batches])
    top.axvline(best.size, color="black", linestyle=":", linewidth=1)
    top.annotate("knee", (best.size, 0), textcoords="offset points", xytext=(4, 4))
    top.set(xscale="log", xlabel="requests at once", title="Batch size")
    _draw_loads(bottom, rates, "TTFT p50, ms", [load.metrics.ttft.p50 for load in rates])
    bottom.set(xlabel="requests per second", title="Arrival rate")
    return figure


def _draw_loads(axes: "Axes", loads: Sequence[Load], label: str, latencies: Sequence[float]) -> None:
    sizes = [load.size for load in loads]
    axes.plot(sizes, [load.metrics.tokens_per_second for load in loads], "o-", color=COLORS[0])
    axes.set_ylabel("tokens/s", color=COLORS[0])
    axes.set_ylim(bottom=0)
    other = axes.twinx()
    other.plot(sizes, latencies, "s--", color=COLORS[1])
    other.set_ylabel(label, color=COLORS[1])
    other.set_ylim(bottom=0)
