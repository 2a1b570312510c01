"""Lab scheduling: a long prompt among decoding requests, chunk by chunk; and what a pool that is too small costs."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from engine_core.engine import EngineCore
from engine_core.scheduler import Scheduler
from minivllm.bench.offline.passes import PassTimer
from minivllm.labs.findings import Findings, Rows
from minivllm.labs.workbench import Workbench
from minivllm.plots import COLORS, new_figure
from minivllm.sampling_params import SamplingParams
from minivllm.simulate.drive import WallClock
from minivllm.simulate.metrics import Metrics
from minivllm.units import TIME, duration, fitting

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHORT_PROMPT = 16


class Stalls(NamedTuple):
    """One chunk size: (seconds, gap before it) of each token of a running stream, and when the long prompt answered."""

    chunk: int
    gaps: list[tuple[float, float]]
    first_token: float  # seconds after the long prompt came

    @property
    def worst(self) -> float:
        return max(gap for _, gap in self.gaps)


def run(bench: Workbench) -> Findings:
    """Chunk sizes on the real engine, then the same requests in a large and in a tiny pool."""
    prompt_len = bench.pick(768, 96, gpu=6144)
    chunks = bench.pick([64, 256, 768], [16, 96], gpu=[256, 1024, 6144])
    bench.watch.plan(len(chunks) + 2)
    stalls = []
    for chunk in chunks:
        engine = bench.engine(max_num_batched_tokens=chunk, enable_prefix_caching=False)
        PassTimer(engine, 1).prefill([prompt_len])  # warms up
        stalls.append(bench.watch.run(f"chunks of {chunk}", partial(interrupt, bench, engine, prompt_len)))
    roomy, tiny = _crowd(bench)
    best, worst = stalls[0], stalls[-1]
    return Findings(
        number=f"While a prompt of {prompt_len} tokens is computed, the longest gap in a running stream is "
        f"{duration(best.worst)} with chunks of {best.chunk} tokens and {duration(worst.worst)} with one chunk "
        f"of {worst.chunk}.",
        broken=f"in one chunk everybody else stands still for {duration(worst.worst)} (the prompt itself answers after "
        f"{duration(worst.first_token)}, in the smallest chunks after {duration(best.first_token)}); in a pool of a "
        f"third of the size {tiny.num_preemptions} preemptions stretch {duration(roomy.seconds)} to "
        f"{duration(tiny.seconds)}.",
        tables=[_chunk_table(stalls), _pool_table(roomy, tiny)],
        figure=_draw(stalls),
        code=(Scheduler.schedule, Scheduler._schedule_prefill, Scheduler._append_slot, Scheduler._preempt),  # noqa: SLF001
    )


def interrupt(bench: Workbench, engine: EngineCore, prompt_len: int) -> Stalls:
    """Four requests decode; in their midst one with a long prompt arrives. Steps are timed until it has answered."""
    num_before, num_after = bench.pick((12, 12), (4, 4))
    clock = WallClock()
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=None)
    short = [f"short-{index}" for index in range(4)]
    for name in short:
        engine.add_request(name, bench.source.choices(range(engine.model.vocab_size), k=_SHORT_PROMPT), params)
    while len(engine.scheduler.decode_queue) < len(short):
        engine.step()
    start = last = clock()
    gaps: list[tuple[float, float]] = []
    came = answered = 0.0
    while len(gaps) < num_before or not answered or len(gaps) < num_before + num_after:
        if len(gaps) == num_before and not came:
            engine.add_request("long", bench.source.choices(range(engine.model.vocab_size), k=prompt_len), params)
            came = clock()
        names = {output.request_id for output in engine.step() if output.token_ids}
        now = clock()
        if "short-0" in names:
            gaps.append((now - start, now - last))
            last = now
        if "long" in names and not answered:
            answered = now
    engine.abort([*short, "long"])
    while engine.has_work:
        engine.step()
    engine.check_integrity()
    return Stalls(engine.max_num_batched_tokens, gaps, answered - came)


def _crowd(bench: Workbench) -> tuple[Metrics, Metrics]:
    """Six requests at once: with room for all, and with a third of the blocks they need in the end."""
    num_requests, output_len = bench.pick((6, 48), (3, 20), gpu=(24, 240))
    trace = bench.at_once([output_len] * num_requests, _SHORT_PROMPT)
    num_blocks = num_requests * -(-(_SHORT_PROMPT + output_len) // 16)
    results = []
    for share in (1, 3):
        engine = bench.engine(num_gpu_blocks_override=num_blocks // share, enable_prefix_caching=False)
        text = f"a pool of {num_blocks // share} blocks"
        results.append(bench.watch.run(text, partial(bench.observe, engine, trace)))
    return results[0], results[1]


def _chunk_table(stalls: Sequence[Stalls]) -> Rows:
    rows = []
    gap_unit = fitting(TIME, [each.worst for each in stalls])
    ttft_unit = fitting(TIME, [each.first_token for each in stalls])
    for each in stalls:
        gaps = sorted(gap for _, gap in each.gaps)
        middle = gap_unit.text(gaps[len(gaps) // 2])
        rows.append((str(each.chunk), middle, gap_unit.text(each.worst), ttft_unit.text(each.first_token)))
    gap, ttft = gap_unit.name, ttft_unit.name
    columns = ("tokens in a chunk", f"ITL p50, {gap}", f"longest gap, {gap}", f"the long prompt's TTFT, {ttft}")
    return Rows("A long prompt arrives", columns, rows)


def _pool_table(roomy: Metrics, tiny: Metrics) -> Rows:
    unit = fitting(TIME, [roomy.seconds, tiny.seconds])
    rows = [
        (
            name,
            unit.text(metrics.seconds),
            str(metrics.num_preemptions),
            f"{unit.text(metrics.e2e.p50 / 1000)} / {unit.text(metrics.e2e.p99 / 1000)}",
        )
        for name, metrics in (("all fit", roomy), ("a third fits", tiny))
    ]
    columns = ("pool", unit.name, "preemptions", f"E2E p50 / p99, {unit.name}")
    return Rows("The same requests, first come first served", columns, rows)


def _draw(stalls: Sequence[Stalls]) -> "Figure":
    figure, (axes,) = new_figure()
    unit = fitting(TIME, [each.worst for each in stalls])
    since = fitting(TIME, [each.gaps[-1][0] for each in stalls])
    for each, color in zip(stalls, COLORS, strict=False):
        times, gaps = [time / since.size for time, _ in each.gaps], [gap / unit.size for _, gap in each.gaps]
        axes.plot(times, gaps, "o-", color=color, label=f"chunks of {each.chunk}", markersize=3)
    axes.set(xlabel=since.name, ylabel=f"{unit.name} since the token before")
    axes.set_title("One running stream while a long prompt comes")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return figure
