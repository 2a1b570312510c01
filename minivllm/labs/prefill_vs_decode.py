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
from minivllm.units import ARITHMETIC, BANDWIDTH, TIME, duration, fitting, number

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
    def seconds_per_token(self) -> float:
        return self.seconds / self.num_tokens

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
    ratio = decode.seconds_per_token / prefill.seconds_per_token
    return Findings(
        number=f"A token costs {duration(prefill.seconds_per_token)} in a prefill of {longest} and "
        f"{duration(decode.seconds_per_token)} in a decode pass of its own: {number(ratio)} times as much.",
        broken=f"a prompt of {longest} tokens in chunks of {_CHUNK} takes {duration(broken)} instead of "
        f"{duration(prefill.seconds)}, {number(broken / prefill.seconds)} times as long: the weights are read for "
        "every chunk.",
        tables=[_table(points)],
        figure=_draw(points, ceilings),
        code=(ModelRunner.run_prefill, ModelRunner.run_decode, Scheduler.schedule),
        notes=[
            f"Roofline: {ceilings}.",
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
    time = fitting(TIME, [point.seconds for point in points])
    per_token = fitting(TIME, [point.seconds_per_token for point in points])
    arithmetic = fitting(ARITHMETIC, [point.flops / point.seconds for point in points])
    bandwidth = fitting(BANDWIDTH, [point.num_bytes / point.seconds for point in points])
    rows = [
        (
            f"{point.kind} of {point.num_tokens}",
            time.text(point.seconds),
            per_token.text(point.seconds_per_token),
            number(point.intensity),
            arithmetic.text(point.flops / point.seconds),
            bandwidth.text(point.num_bytes / point.seconds),
        )
        for point in points
    ]
    columns = ("pass", time.name, f"{per_token.name} per token", "FLOP per byte", arithmetic.name, bandwidth.name)
    return Rows("Passes", columns, rows)


def _draw(points: list[Point], ceilings: Ceilings) -> "Figure":
    figure, (left, right) = new_figure(2)
    time = fitting(TIME, [point.seconds_per_token for point in points])
    arithmetic = fitting(ARITHMETIC, [ceilings.flops_per_second])
    for kind, color in (("prefill", COLORS[0]), ("decode", COLORS[1])):
        own = [point for point in points if point.kind == kind]
        sizes = [point.num_tokens for point in own]
        left.plot(sizes, [point.seconds_per_token / time.size for point in own], "o-", color=color, label=kind)
        speeds = [point.flops / point.seconds / arithmetic.size for point in own]
        right.plot([point.intensity for point in own], speeds, "o", color=color, label=kind)
    left.set(xscale="log", yscale="log", xlabel="tokens in the pass", title="Time per token")
    left.set_ylabel(f"{time.name} per token")
    ridge = ceilings.flops_per_second / ceilings.bytes_per_second
    low, high = min(point.intensity for point in points) / 2, max(ridge, *(point.intensity for point in points)) * 2
    roof = [low * ceilings.bytes_per_second, ceilings.flops_per_second, ceilings.flops_per_second]
    right.plot(
        [low, ridge, high], [flops / arithmetic.size for flops in roof], color="black", linewidth=1, label="roofline"
    )
    right.set(xscale="log", yscale="log", xlabel="FLOP per byte", title="Where bytes or arithmetic limit")
    right.set_ylabel(arithmetic.name)
    for axes in (left, right):
        axes.legend(frameon=False)
    return figure
