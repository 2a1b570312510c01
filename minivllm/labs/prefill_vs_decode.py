"""Lab prefill-vs-decode: time per token and arithmetic intensity of both kinds of pass, on this machine's roofline."""

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from engine_core.engine import EngineCore
from engine_core.model_loader import read_config
from engine_core.model_runner import ModelRunner
from engine_core.scheduler import Scheduler
from minivllm.bench.offline.cost import ModelCost, model_cost
from minivllm.bench.offline.machine import Ceilings, measure_ceilings
from minivllm.bench.offline.passes import PassTimer
from minivllm.labs.findings import Findings, Rows
from minivllm.labs.workbench import Workbench
from minivllm.plots import COLORS, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CONTEXT = 32
_CHUNK = 8


class Point(NamedTuple):
    """One pass: tokens, seconds, floating-point operations and bytes that it cannot do without."""

    kind: str
    num_tokens: int
    seconds: float
    flops: float
    num_bytes: float

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.flops / self.num_bytes


def run(bench: Workbench) -> Findings:
    """Prefill of growing prompts, decode of growing batches."""
    engine = bench.engine()
    layout, device = engine.model.layout, engine.model.device
    cost = model_cost(read_config(bench.directory), engine.model.weight_bytes, layout.bytes_per_token)
    ceilings = bench.watch.run("the machine's ceilings", lambda: measure_ceilings(device, layout.dtype))
    points = _measure(bench, engine, cost)
    longest = max(point.num_tokens for point in points if point.kind == "prefill")
    chunked = bench.engine(max_num_batched_tokens=_CHUNK)
    broken = bench.watch.run("the same in small chunks", lambda: PassTimer(chunked, 1).prefill([longest]).seconds)
    prefill = next(point for point in points if point.kind == "prefill" and point.num_tokens == longest)
    decode = next(point for point in points if point.kind == "decode" and point.num_tokens == 1)
    ratio = (decode.seconds / 1) / (prefill.seconds / longest)
    return Findings(
        number=f"A token costs {1000 * prefill.seconds / longest:.2f} ms in a prefill of {longest} and "
        f"{1000 * decode.seconds:.1f} ms in a decode pass of its own: {ratio:.0f} times as much.",
        broken=f"a prompt of {longest} tokens in chunks of {_CHUNK} takes {broken:.2f} s instead of "
        f"{prefill.seconds:.2f} s, {broken / prefill.seconds:.1f} times as long: the weights are read for every chunk.",
        tables=[_table(points)],
        figure=_draw(points, ceilings),
        code=(ModelRunner.run_prefill, ModelRunner.run_decode, Scheduler.schedule),
        notes=[
            f"Roofline: {ceilings.bytes_per_second / 1e9:.0f} GB/s, {ceilings.flops_per_second / 1e9:,.0f} GFLOP/s.",
            "Operations and bytes are the least that the model's shape allows.",
        ],
    )


def _measure(bench: Workbench, engine: EngineCore, cost: ModelCost) -> list[Point]:
    timer = PassTimer(engine, bench.pick(3, 1, gpu=10), bench.pick(20, 2, gpu=50))
    lengths = bench.pick([8, 32, 128, 512], [8, 32], gpu=[8, 32, 128, 512, 2048, 4096])
    batches = bench.pick([1, 2, 4, 8, 16, 32], [1, 4], gpu=[1, 4, 16, 64, 256])
    bench.watch.plan(len(lengths) + len(batches) + 2)
    timer.prefill([lengths[-1]])  # warms up
    points = []
    for length in lengths:
        seconds = bench.watch.run(f"prefill of {length}", partial(timer.prefill, [length])).seconds
        flops = length * cost.flops_per_token + length * (length + 1) // 2 * cost.flops_per_pair
        points.append(Point("prefill", length, seconds, flops, cost.weight_bytes + length * cost.kv_bytes_per_token))
    for rows in batches:
        timed = bench.watch.run(f"decode of {rows}", partial(timer.decode, [_CONTEXT] * rows))
        flops = rows * cost.flops_per_token + timed.num_context_tokens * cost.flops_per_pair
        points.append(Point("decode", rows, timed.seconds, flops, cost.decode_bytes(1, timed.num_context_tokens)))
    return points


def _table(points: list[Point]) -> Rows:
    rows = [
        (
            f"{point.kind} of {point.num_tokens}",
            f"{1000 * point.seconds:.1f}",
            f"{1000 * point.seconds / point.num_tokens:.2f}",
            f"{point.intensity:.1f}",
            f"{point.flops / point.seconds / 1e9:.1f}",
            f"{point.num_bytes / point.seconds / 1e9:.1f}",
        )
        for point in points
    ]
    return Rows("Passes", ("pass", "ms", "ms per token", "FLOP per byte", "GFLOP/s", "GB/s"), rows)


def _draw(points: list[Point], ceilings: Ceilings) -> "Figure":
    figure, (left, right) = new_figure(2)
    for kind, color in (("prefill", COLORS[0]), ("decode", COLORS[1])):
        own = [point for point in points if point.kind == kind]
        sizes = [point.num_tokens for point in own]
        left.plot(sizes, [1000 * point.seconds / point.num_tokens for point in own], "o-", color=color, label=kind)
        speeds = [point.flops / point.seconds / 1e9 for point in own]
        right.plot([point.intensity for point in own], speeds, "o", color=color, label=kind)
    left.set(xscale="log", yscale="log", xlabel="tokens in the pass", ylabel="ms per token", title="Time per token")
    ridge = ceilings.flops_per_second / ceilings.bytes_per_second
    low, high = min(point.intensity for point in points) / 2, max(ridge, *(point.intensity for point in points)) * 2
    roof = [low * ceilings.bytes_per_second / 1e9, ceilings.flops_per_second / 1e9, ceilings.flops_per_second / 1e9]
    right.plot([low, ridge, high], roof, color="black", linewidth=1, label="roofline")
    right.set(
        xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="GFLOP/s", title="Where bytes or arithmetic limit"
    )
    for axes in (left, right):
        axes.legend(frameon=False)
    return figure
