"""Lab paging: memory given and memory used over block sizes, up to one contiguous slot; the KV manager, no model."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from engine_core.block_pool import BlockPool
from engine_core.engine import EngineCore, RequestOutput
from engine_core.kv_cache_manager import KVCacheManager
from minivllm.labs.findings import Findings, Rows
from minivllm.labs.workbench import Workbench
from minivllm.plots import COLORS, new_figure
from minivllm.simulate.cost_model import DEFAULT_COST_MODEL, load_cost_model
from minivllm.simulate.engine import Policy
from minivllm.simulate.metrics import Metrics
from minivllm.simulate.run import simulate
from minivllm.simulate.trace import TraceShape, make_trace
from minivllm.units import number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CONTEXT = 2048  # tokens of a contiguous slot
_POOL = 8 * _CONTEXT  # tokens of the pool: eight slots


class Paged(NamedTuple):
    """One block size. `waste` is the share of given tokens that hold nothing, over all steps."""

    block_size: int
    waste: float
    mean_running: float
    metrics: Metrics


def run(bench: Workbench) -> Findings:
    """The real scheduler and KV manager in virtual time: what they give out does not depend on a model."""
    sizes = bench.pick([1, 4, 16, 64, 256, 512, 1024, _CONTEXT], [16, 256, _CONTEXT])
    num_requests = bench.pick(400, 40)
    bench.watch.plan(len(sizes))
    found = [bench.watch.run(f"blocks of {size}", partial(page, size, num_requests)) for size in sizes]
    lens = "20 to 1,000 prompt and 20 to 1,000 output tokens (log-normal)"
    sixteen = next(each for each in found if each.block_size == 16)
    slots = found[-1]
    return Findings(
        number=f"Blocks of 16 tokens waste {100 * sixteen.waste:.1f} % of the memory given out and run "
        f"{number(sixteen.mean_running)} requests at once.",
        broken=f"contiguous slots of {_CONTEXT} tokens waste {100 * slots.waste:.0f} %, so that the same memory runs "
        f"{number(slots.mean_running)} requests at once and makes {number(slots.metrics.tokens_per_second)} tokens/s "
        f"instead of {number(sixteen.metrics.tokens_per_second)}.",
        tables=[_table(found)],
        figure=_draw(found),
        code=(KVCacheManager, KVCacheManager.append_slot, BlockPool.allocate),
        notes=[
            f"{num_requests} requests at once of {lens} in a pool of {_POOL:,} tokens.",
            f"Simulated on the packaged cost model ({DEFAULT_COST_MODEL}).",
        ],
    )


def page(block_size: int, num_requests: int) -> Paged:
    """Simulate with this block size; after every step count the tokens that blocks could hold and do hold."""
    shape = TraceShape("at-once", num_requests, lengths="lognormal", input_lens=(20, 1000), output_lens=(20, 1000))
    policy = Policy(block_size=block_size, num_blocks=_POOL // block_size, enable_prefix_caching=False)
    given = held = running = num_steps = 0

    def on_step(engine: EngineCore, outputs: list[RequestOutput], now: float) -> None:
        nonlocal given, held, running, num_steps
        requests = [*engine.scheduler.decode_queue, *(r for r in engine.scheduler.prefill_queue if r.row >= 0)]
        given += sum(len(request.block_table) for request in requests) * block_size
        held += sum(request.num_computed_tokens for request in requests)
        running += len(requests)
        num_steps += 1

    metrics = simulate(load_cost_model(DEFAULT_COST_MODEL), policy, make_trace(shape), on_step).metrics
    return Paged(block_size, 1 - held / given, running / num_steps, metrics)


def _table(found: Sequence[Paged]) -> Rows:
    rows = [
        (
            f"{each.block_size:,}",
            f"{100 * each.waste:.1f}",
            number(each.mean_running),
            number(each.metrics.tokens_per_second),
            str(each.metrics.num_preemptions),
        )
        for each in found
    ]
    return Rows("Block sizes", ("tokens in a block", "wasted, %", "requests at once", "tokens/s", "preemptions"), rows)


def _draw(found: Sequence[Paged]) -> "Figure":
    figure, (top, bottom) = new_figure(2, height=2.6)
    places, names = range(len(found)), [f"{each.block_size:,}" for each in found]
    top.bar(places, [100 * each.waste for each in found], color=COLORS[1])
    top.set(ylabel="wasted, %", title=f"Memory given out that holds nothing ({found[-1].block_size}: contiguous slots)")
    bottom.bar(places, [each.mean_running for each in found], color=COLORS[0])
    bottom.set(ylabel="requests at once", xlabel="tokens in a block")
    for axes in (top, bottom):
        axes.set_xticks(places, names)
    return figure
