"""Lab batching: the same requests one at a time, in static batches and continuously, as a Gantt chart over steps."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine_core.engine import EngineCore, RequestOutput
from engine_core.scheduler import Scheduler
from minivllm.bench.offline.hf import HFJob, time_hf_here
from minivllm.bench.offline.work import Work
from minivllm.labs.findings import Findings, Rows
from minivllm.labs.workbench import Workbench
from minivllm.plots import COLORS, new_figure
from minivllm.simulate.drive import WallClock, run_trace
from minivllm.simulate.trace import Arrival
from minivllm.units import TIME, duration, fitting, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PROMPT_LEN = 16
_MAX_LISTED = 12  # output lengths that are shown one by one


@dataclass
class Schedule:
    """One way to run the work. `spans[i]` is the first and last step that request i was in; waits in seconds."""

    name: str
    seconds: float = 0.0
    num_steps: int = 0
    spans: list[tuple[int, int]] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)


def run(bench: Workbench) -> Findings:
    """All ways on the same prompts and output lengths."""
    width, num_requests, longest = bench.pick((4, 16, 36), (2, 4, 8), gpu=(16, 64, 256))
    output_lens = [round(longest / 12 ** (index / (num_requests - 1))) for index in range(num_requests)]
    bench.source.shuffle(output_lens)
    trace = bench.at_once(output_lens, _PROMPT_LEN)
    bench.watch.plan(4)
    engine = bench.engine(max_num_seqs=width, enable_prefix_caching=False)
    run_trace(engine, bench.at_once([2] * width, _PROMPT_LEN), WallClock())  # warms up
    continuous = bench.watch.run("continuous", lambda: run_batches("continuous", engine, [trace]))
    batches = [trace[start : start + width] for start in range(0, num_requests, width)]
    static = bench.watch.run("static", lambda: run_batches("static", engine, batches))
    alone = bench.engine(max_num_seqs=1, enable_prefix_caching=False)
    single = bench.watch.run("one at a time", lambda: run_batches("one at a time", alone, [trace]))
    ways = [single, static, continuous]
    num_tokens = sum(output_lens)
    work = Work([each.prompt_token_ids(i, engine.model.vocab_size) for i, each in enumerate(trace)], output_lens)
    job = HFJob(bench.config(), bench.directory, [work], 0.0, width, 1)
    hf_seconds = bench.watch.run("Hugging Face generate()", lambda: time_hf_here(job)[0])
    faster = static.seconds / continuous.seconds
    return Findings(
        number=f"Continuous batching: {number(num_tokens / continuous.seconds)} tokens/s in {continuous.num_steps:,} "
        f"steps, static {number(num_tokens / static.seconds)} in {static.num_steps:,}: {number(faster)} times as fast.",
        broken=f"one request at a time makes {number(num_tokens / single.seconds)} tokens/s and lets a request wait "
        f"{duration(mean(single.waits))} on average, against {duration(mean(continuous.waits))}.",
        tables=[_table(ways, num_tokens, hf_seconds, width)],
        figure=_draw(ways),
        code=(Scheduler.schedule, Scheduler.remove, EngineCore.step),
        notes=[f"{_described(output_lens)}, {width} at a time."],
    )


def run_batches(name: str, engine: EngineCore, batches: Sequence[Sequence[Arrival]]) -> Schedule:
    """One batch after the other on an idle engine; waits count from the very start."""
    schedule = Schedule(name)
    clock = WallClock()
    start = clock()
    for batch in batches:
        first = len(schedule.spans)
        schedule.spans += [(-1, -1)] * len(batch)

        def on_step(engine: EngineCore, outputs: list[RequestOutput], now: float, first: int = first) -> None:
            schedule.num_steps += 1
            for output in outputs:
                index = first + int(output.request_id.rpartition("-")[2])
                begin = schedule.spans[index][0]
                schedule.spans[index] = (schedule.num_steps if begin < 0 else begin, schedule.num_steps)

        before = clock() - start
        observed = run_trace(engine, batch, clock, on_step)
        schedule.waits += [before + request.first_token for request in observed.requests]
    schedule.seconds = clock() - start
    engine.check_integrity()
    return schedule


def mean(values: Sequence[float]) -> float:
    """Of at least one value."""
    return sum(values) / len(values)


def _described(output_lens: Sequence[int]) -> str:
    if len(output_lens) <= _MAX_LISTED:
        return f"Requests of {', '.join(map(str, output_lens))} output tokens"
    shortest, longest = min(output_lens), max(output_lens)
    return (
        f"{len(output_lens)} requests of {shortest} to {longest} output tokens, {number(mean(output_lens))} on average"
    )


def _table(ways: Sequence[Schedule], num_tokens: int, hf_seconds: float, width: int) -> Rows:
    unit = fitting(TIME, [mean(way.waits) for way in ways])
    rows = [
        (
            way.name,
            number(num_tokens / way.seconds),
            f"{way.num_steps:,}",
            number(num_tokens / way.num_steps),
            unit.text(mean(way.waits)),
        )
        for way in ways
    ]
    rows.insert(0, (f"Hugging Face generate(), batches of {width}", number(num_tokens / hf_seconds), "", "", ""))
    columns = ("way", "tokens/s", "steps", "tokens per step", f"mean wait for a token, {unit.name}")
    return Rows("The same work", columns, rows)


def _draw(ways: Sequence[Schedule]) -> "Figure":
    figure, plots = new_figure(len(ways), height=2.3)
    last = max(way.num_steps for way in ways)
    for axes, way, color in zip(plots, ways, COLORS, strict=False):
        lengths = [end - begin + 1 for begin, end in way.spans]
        axes.barh(range(len(lengths)), lengths, left=[begin for begin, _ in way.spans], color=color, height=0.8)
        axes.set(
            xlim=(0, last + 1), ylabel="request", title=f"{way.name}: {way.num_steps:,} steps, {duration(way.seconds)}"
        )
        axes.invert_yaxis()
    plots[-1].set_xlabel("step of the engine")
    return figure
